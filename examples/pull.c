/*
 * pull.c - read an answer with a while loop, no callbacks
 *
 *     build/examples/pull [--replay FILE] PROMPT
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    bool replay = argc == 4 && strcmp(argv[1], "--replay") == 0;
    if (argc != 2 && !replay) {
        fprintf(stderr, "usage: pull [--replay FILE] PROMPT\n");
        return 2;
    }

    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat_desc desc = { .model = "gpt-4o-mini" };
    if (replay) {
        llmcb_replay_desc recording = { .path = argv[2] };
        desc.transport = llmcb_replay_new(loop, &recording);
    }
    llmcb_chat *chat = llmcb_chat_new(loop, &desc);

    llmcb_message message = { .role = LLMCB_USER, .content = argv[argc - 1] };
    llmcb_op *op = llmcb_chat_stream(chat, &message, 1, NULL);
    const llmcb_chunk *chunk;
    while (llmcb_op_next(op, &chunk)) {
        llmcb_str_print(chunk->text, stdout);
        fflush(stdout);
    }
    putchar('\n');

    /* The answer is whole, or this says why not; never in between. */
    llmcb_code code = llmcb_op_code(op);
    if (code != LLMCB_OK) fprintf(stderr, "%s\n", llmcb_op_error(op)->message);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return code != LLMCB_OK;
}
