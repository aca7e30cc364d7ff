/*
 * coroutine.c - a coroutine that awaits one thing after the other
 *
 *     build/examples/coroutine [--replay FILE]
 *
 * It reads a topic from the terminal, which blocks and so happens on the
 * thread pool; asks two questions about it at once; and tells the second
 * answer a second after the first. The loop never stands still.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <string.h>

/* What must survive an await: locals do not. */
struct talk {
    llmcb_chat *chat;
    char topic[200];
    llmcb_op *ops[2];
};

static int read_topic(void *arg)
{
    struct talk *talk = (struct talk *)arg;
    fputs("A topic, please: ", stdout);
    fflush(stdout);
    if (!fgets(talk->topic, sizeof talk->topic, stdin)) return LLMCB_EIO;
    talk->topic[strcspn(talk->topic, "\n")] = '\0';
    return 0;
}

static llmcb_op *ask(struct talk *talk, const char *format)
{
    char text[300];
    llmcb_message message = { .role = LLMCB_USER, .content = text };
    snprintf(text, sizeof text, format, talk->topic);
    return llmcb_chat_generate(talk->chat, &message, 1, NULL);
}

static void print_answer(const char *title, const llmcb_op *op)
{
    const llmcb_result *result = llmcb_op_result(op);
    printf("\n%s: %s\n", title,
           result->n_generations ? result->generations[0].text.ptr : "");
}

static llmcb_step talk_about(llmcb_task *t)
{
    struct talk *talk = (struct talk *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_blocking(t, read_topic, talk));
    if (t->result != LLMCB_OK) return t->result;

    talk->ops[0] = ask(talk, "Tell me a joke about %s.");
    talk->ops[1] = ask(talk, "Tell me a fact about %s.");
    LLMCB_AWAIT(t, llmcb_await_all(t, talk->ops, 2, 60000));
    if (t->result != LLMCB_OK) return t->result;

    print_answer("The joke", talk->ops[0]);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000));
    print_answer("The fact", talk->ops[1]);
    LLMCB_END(t);
}

int main(int argc, char **argv)
{
    struct talk talk = { .chat = NULL };
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat_desc desc = { .model = "gpt-4o-mini" };
    if (argc == 3 && strcmp(argv[1], "--replay") == 0) {
        llmcb_replay_desc recording = { .path = argv[2] };
        desc.transport = llmcb_replay_new(loop, &recording);
    }
    if (argc != 1 && !desc.transport) {
        fprintf(stderr, "usage: coroutine [--replay FILE]\n");
        llmcb_loop_free(loop);
        return 2;
    }
    talk.chat = llmcb_chat_new(loop, &desc);

    llmcb_op *op = llmcb_task_start(loop, talk_about, 0, &talk);
    llmcb_code code = llmcb_op_wait(op);
    if (code != LLMCB_OK) fprintf(stderr, "%s\n", llmcb_op_error(op)->message);

    llmcb_op_free(op);
    llmcb_op_free(talk.ops[0]);
    llmcb_op_free(talk.ops[1]);
    llmcb_chat_free(talk.chat);
    llmcb_loop_free(loop);
    return code != LLMCB_OK;
}
