/*
 * chat.c - a chat in the terminal, with any OpenAI-compatible server
 *
 *     build/examples/chat [--base-url URL] [--model NAME] [--replay FILE]
 *
 * OPENAI_API_KEY and OPENAI_BASE_URL are honoured. Ctrl-C ends the answer,
 * Ctrl-D the program.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static llmcb_message *history;
static size_t n_history;
static llmcb_op *volatile answering;

static void on_interrupt(int signum)
{
    (void)signum;
    llmcb_op_cancel(answering); /* signal-safe; does nothing with NULL */
}

static void remember(llmcb_role role, const char *text)
{
    llmcb_message message = { .role = role, .content = strdup(text) };
    history =
        (llmcb_message *)realloc(history, (n_history + 1) * sizeof *history);
    if (!history || !message.content) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    history[n_history++] = message;
}

static void forget_last(void)
{
    free((void *)history[--n_history].content);
}

static void answer(llmcb_chat *chat)
{
    llmcb_op *op = llmcb_chat_stream(chat, history, n_history, NULL);
    const llmcb_result *result;
    const llmcb_chunk *chunk;

    answering = op;
    while (llmcb_op_next(op, &chunk)) {
        llmcb_str_print(chunk->text, stdout); /* it cannot steer the terminal */
        fflush(stdout);
    }
    answering = NULL;
    putchar('\n');
    if (llmcb_op_code(op) != LLMCB_OK)
        fprintf(stderr, "[%s]\n", llmcb_op_error(op)->message);

    result = llmcb_op_result(op); /* after an error, what there was of it */
    if (result->n_generations > 0 && result->generations[0].text.len > 0)
        remember(LLMCB_ASSISTANT, result->generations[0].text.ptr);
    else
        forget_last();
    llmcb_op_free(op);
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_flags = SA_RESTART };
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat_desc desc = { .model = NULL };
    char line[4096];

    for (int i = 1; i < argc; i += 2) {
        const char *value = argv[i + 1];
        llmcb_replay_desc recording = { .path = value };
        if (value && strcmp(argv[i], "--base-url") == 0) {
            desc.base_url = value;
        } else if (value && strcmp(argv[i], "--model") == 0) {
            desc.model = value;
        } else if (!value || strcmp(argv[i], "--replay") != 0 ||
                   !(desc.transport = llmcb_replay_new(loop, &recording))) {
            fprintf(stderr, "chat: cannot use %s\n", argv[i]);
            llmcb_loop_free(loop);
            return 2;
        }
    }
    llmcb_chat *chat = llmcb_chat_new(loop, &desc);
    action.sa_handler = on_interrupt;
    sigaction(SIGINT, &action, NULL);

    for (;;) {
        if (isatty(STDIN_FILENO)) fputs("> ", stdout);
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin)) break;
        line[strcspn(line, "\n")] = '\0';
        if (line[0]) {
            remember(LLMCB_USER, line);
            answer(chat);
        }
    }

    while (n_history > 0)
        forget_last();
    free(history);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return 0;
}
