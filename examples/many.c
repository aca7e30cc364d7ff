/*
 * many.c - many prompts at once, in one thread
 *
 *     build/examples/many [--base-url URL] [--model NAME] [--jobs N]
 *                         [--replay FILE] PROMPT...
 *
 * A line on the terminal shows how far they are; a table has the answers.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct progress {
    llmcb_loop *loop;
    size_t prompts, answered, tokens;
    int64_t shown_at;
};

static int show_progress(llmcb_handler *h, const llmcb_event *ev)
{
    struct progress *p = (struct progress *)h->user;
    int64_t now = llmcb_loop_now(p->loop);

    p->tokens += ev->token->text.len > 0;
    p->answered += ev->token->parts->finish_reason.len > 0;
    if (now - p->shown_at >= 100 || p->answered == p->prompts) {
        p->shown_at = now;
        fprintf(stderr, "\r%zu of %zu answered, %zu tokens ", p->answered,
                p->prompts, p->tokens);
    }
    return 0;
}

/* At most 48 characters, on one line. */
static void print_start(const char *s)
{
    for (int n = 0; *s; s++) {
        bool first_byte = (*s & 0xC0) != 0x80; /* of a UTF-8 sequence */
        if (first_byte && n++ == 48) break;
        putchar((unsigned char)*s < ' ' ? ' ' : *s);
    }
    putchar('\n');
}

static void print_table(const llmcb_op *op)
{
    printf("\n%4s %6s %6s  %-14s %s\n", "", "in", "out", "finish", "answer");
    for (size_t i = 0; i < llmcb_op_n_prompts(op); i++) {
        const llmcb_error *error = llmcb_op_error_at(op, i);
        const llmcb_result *r = llmcb_op_result_at(op, i);
        bool answered = error->code == LLMCB_OK && r->n_generations > 0;
        printf("%4zu %6" PRId64 " %6" PRId64 "  %-14s ", i + 1,
               r->usage.input_tokens, r->usage.output_tokens,
               answered ? r->generations[0].finish_reason.ptr
                        : llmcb_code_name(error->code));
        print_start(answered ? r->generations[0].text.ptr : error->message);
    }
}

int main(int argc, char **argv)
{
    enum { MOST = 1000 };
    static llmcb_message messages[MOST];
    static llmcb_prompt prompts[MOST];
    struct progress progress = { .loop = NULL };
    llmcb_handler handler = { .sync = { .on_llm_new_token = show_progress },
                              .flags = LLMCB_INLINE, /* must not block */
                              .user = &progress };
    llmcb_handler *callbacks[] = { &handler };
    llmcb_chat_desc desc = { .streaming = true };
    llmcb_config config = { .callbacks = callbacks };
    llmcb_loop *loop = llmcb_loop_new(NULL);
    int i;

    for (i = 1; i < argc && strncmp(argv[i], "--", 2) == 0; i += 2) {
        const char *value = argv[i + 1];
        llmcb_replay_desc recording = { .path = value };
        if (value && strcmp(argv[i], "--base-url") == 0) {
            desc.base_url = value;
        } else if (value && strcmp(argv[i], "--model") == 0) {
            desc.model = value;
        } else if (value && strcmp(argv[i], "--jobs") == 0) {
            config.max_concurrency = (unsigned)strtoul(value, NULL, 10);
        } else if (!value || strcmp(argv[i], "--replay") != 0 ||
                   !(desc.transport = llmcb_replay_new(loop, &recording))) {
            fprintf(stderr, "many: cannot use %s\n", argv[i]);
            llmcb_loop_free(loop);
            return 2;
        }
    }

    size_t n = (size_t)(argc - i);
    if (n == 0 || n > MOST) {
        fprintf(stderr, "usage: see the top of many.c\n");
        llmcb_loop_free(loop);
        return 2;
    }
    for (size_t k = 0; k < n; k++) {
        messages[k].content = argv[(size_t)i + k];
        prompts[k].messages = &messages[k];
        prompts[k].n = 1;
    }
    progress.loop = loop;
    progress.prompts = n;
    config.n_callbacks = isatty(STDERR_FILENO) ? 1 : 0;
    llmcb_chat *chat = llmcb_chat_new(loop, &desc);
    llmcb_op *op = llmcb_chat_batch(chat, prompts, n, &config);
    llmcb_code code = llmcb_op_wait(op);
    print_table(op);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return code != LLMCB_OK;
}
