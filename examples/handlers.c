/*
 * handlers.c - four ways of being told, and the order that comes of them
 *
 *     build/examples/handlers
 *
 * Three tokens arrive at once. The handler that is awaited holds up those
 * behind; the slow one does not, but the end event waits for it to catch up.
 * The answer is a recording in memory, and time is virtual.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>

#define TOKEN(text)                                                   \
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" text \
    "\"}}]}\n\n"

static const char answer[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" TOKEN("one")
        TOKEN("two") TOKEN("three") "data: [DONE]\n\n";

/* A handler with what it needs. It comes first, so that one is the other. */
struct teller {
    llmcb_handler handler;
    llmcb_loop *loop;
    int64_t ms; /* that an event takes it */
};

static const char *word(const llmcb_event *ev)
{
    if (ev->token) return ev->token->text.ptr;
    return ev->start ? "(start)" : "(end)";
}

/* Sync: runs on the thread pool, where it may block. */
static int on_the_pool(llmcb_handler *h, const llmcb_event *ev)
{
    printf("   pool  %-7s  %s\n", h->name, word(ev));
    return 0;
}

/* Sync and inline: runs on the loop's thread, and must not block. */
static int on_the_loop(llmcb_handler *h, const llmcb_event *ev)
{
    struct teller *teller = (struct teller *)(void *)h;
    printf("%4d ms  %-7s  %s\n", (int)llmcb_loop_now(teller->loop), h->name,
           word(ev));
    return 0;
}

/* Async: a coroutine on the loop's thread, which goes on meanwhile. */
static llmcb_step in_its_time(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    struct teller *teller = (struct teller *)(void *)h;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, teller->ms));
    on_the_loop(h, ev);
    LLMCB_END(t);
}

static struct teller told(const char *name, llmcb_sync_fn fn, llmcb_loop *loop,
                          unsigned flags)
{
    struct teller teller = { .handler = { .sync = { .on_chat_model_start = fn,
                                                    .on_llm_new_token = fn,
                                                    .on_llm_end = fn },
                                          .flags = flags,
                                          .name = name },
                             .loop = loop };

    return teller;
}

static struct teller told_async(const char *name, int64_t ms, llmcb_loop *loop,
                                unsigned flags)
{
    struct teller teller = {
        .handler = { .async = { .on_chat_model_start = in_its_time,
                                .on_llm_new_token = in_its_time,
                                .on_llm_end = in_its_time },
                     .flags = flags,
                     .name = name },
        .loop = loop,
        .ms = ms
    };
    return teller;
}

int main(void)
{
    llmcb_loop_desc virtual_time = { .virtual_clock = true };
    llmcb_loop *loop = llmcb_loop_new(&virtual_time);
    llmcb_recording recording = { .bytes = answer, .len = sizeof answer - 1 };
    llmcb_replay_desc replay = { .recordings = &recording, .n_recordings = 1 };

    struct teller pool = told("sync", on_the_pool, loop, 0);
    struct teller quick = told("inline", on_the_loop, loop, LLMCB_INLINE);
    struct teller slow = told_async("async", 250, loop, 0);
    struct teller each = told_async("awaited", 100, loop, LLMCB_AWAIT_EACH);
    llmcb_handler *callbacks[] = { &pool.handler, &slow.handler, &each.handler,
                                   &quick.handler };
    llmcb_chat_desc desc = { .streaming = true,
                             .transport = llmcb_replay_new(loop, &replay),
                             .callbacks = callbacks,
                             .n_callbacks = 4 };
    llmcb_message question = { .content = "Count to three." };

    llmcb_chat *chat = llmcb_chat_new(loop, &desc);
    llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);
    llmcb_code code = llmcb_op_wait(op);
    if (code != LLMCB_OK) fprintf(stderr, "%s\n", llmcb_op_error(op)->message);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return code != LLMCB_OK;
}
