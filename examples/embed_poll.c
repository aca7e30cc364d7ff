/*
 * embed_poll.c - llmcb inside a program's own poll loop
 *
 *     build/examples/embed_poll [--replay FILE]
 *
 * The program polls stdin and, beside it, what llmcb wishes to have polled.
 * Every line is a question; the answers are printed as they arrive.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static llmcb_chat *chat;
static llmcb_op **ops; /* the questions under way */
static size_t n_ops;

static void *grow(void *ptr, size_t size)
{
    ptr = realloc(ptr, size);
    if (!ptr) exit(1);
    return ptr;
}

static void ask(const char *question)
{
    llmcb_message message = { .role = LLMCB_USER, .content = question };
    ops = (llmcb_op **)grow(ops, (n_ops + 1) * sizeof *ops);
    ops[n_ops++] = llmcb_chat_generate(chat, &message, 1, NULL);
}

static void print_answers(void)
{
    for (size_t i = 0; i < n_ops;) {
        if (!llmcb_op_done(ops[i])) {
            i++;
            continue;
        }
        if (llmcb_op_code(ops[i]) == LLMCB_OK)
            llmcb_result_print(llmcb_op_result(ops[i]), stdout);
        else
            fprintf(stderr, "%s\n", llmcb_op_error(ops[i])->message);
        llmcb_op_free(ops[i]);
        ops[i] = ops[--n_ops];
    }
}

/* Asks what stdin has by now; false at its end. */
static bool read_questions(void)
{
    static char input[4096];
    static size_t len;
    ssize_t got = read(STDIN_FILENO, input + len, sizeof input - 1 - len);
    char *line = input, *newline;

    if (got <= 0) {
        if (len > 0) ask(input); /* a last line without a newline */
        return false;
    }
    len += (size_t)got;
    input[len] = '\0';
    while ((newline = strchr(line, '\n')) != NULL) {
        *newline = '\0';
        ask(line);
        line = newline + 1;
    }
    len = strlen(line); /* the rest waits for its newline */
    memmove(input, line, len + 1);
    return true;
}

int main(int argc, char **argv)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat_desc desc = { .model = "gpt-4o-mini" };
    size_t n, cap = 8;
    struct pollfd *fds = (struct pollfd *)grow(NULL, cap * sizeof *fds);
    int64_t ms;
    bool open = true;

    if (argc == 3 && strcmp(argv[1], "--replay") == 0) {
        llmcb_replay_desc recording = { .path = argv[2] };
        desc.transport = llmcb_replay_new(loop, &recording);
    }
    if (argc != 1 && !desc.transport) {
        fprintf(stderr, "usage: embed_poll [--replay FILE]\n");
        llmcb_loop_free(loop);
        return 2;
    }
    chat = llmcb_chat_new(loop, &desc);

    while (open || n_ops > 0) {
        llmcb_loop_prepare(loop, &ms);
        n = llmcb_loop_pollfds(loop, fds + 1, cap - 1);
        if (n > cap - 1) {
            cap = n + 1;
            fds = (struct pollfd *)grow(fds, cap * sizeof *fds);
            continue;
        }
        fds[0].fd = open ? STDIN_FILENO : -1; /* poll ignores -1 */
        fds[0].events = POLLIN;
        if (poll(fds, (nfds_t)(n + 1), ms > INT_MAX ? INT_MAX : (int)ms) < 0)
            continue; /* a signal */

        if (fds[0].revents) open = read_questions();
        llmcb_loop_dispatch(loop, fds + 1, n);
        print_answers();
    }

    free(ops);
    free(fds);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return 0;
}
