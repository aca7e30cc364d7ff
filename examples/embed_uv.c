/*
 * embed_uv.c - llmcb on libuv's loop
 *
 *     build/examples/embed_uv [--replay FILE]
 *
 * libuv runs; llmcb tells it what to watch and when to call. A timer of the
 * program's own ticks on while the answer comes.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

static llmcb_loop *loop;

/* One descriptor that llmcb wants to have watched. */
typedef struct watch {
    uv_poll_t poll;
    int fd;
    struct watch *next;
} watch;

static watch *watches;

static void on_fd(uv_poll_t *poll, int status, int events)
{
    watch *w = (watch *)poll->data;
    int seen = (events & UV_READABLE ? LLMCB_READ : 0) |
               (events & UV_WRITABLE ? LLMCB_WRITE : 0);

    if (status < 0) seen = LLMCB_READ | LLMCB_WRITE; /* llmcb will find out */
    llmcb_loop_fd_event(loop, w->fd, seen);
}

static void on_closed(uv_handle_t *handle)
{
    free(handle->data);
}

static void host_watch(void *user, int fd, int events)
{
    watch **at = &watches, *w;

    while (*at && (*at)->fd != fd)
        at = &(*at)->next;
    w = *at;
    if (!events) {
        if (!w) return;
        *at = w->next;
        uv_close((uv_handle_t *)&w->poll, on_closed);
        return;
    }
    if (!w) {
        w = (watch *)calloc(1, sizeof *w);
        if (!w || uv_poll_init((uv_loop_t *)user, &w->poll, fd) != 0) exit(1);
        w->fd = fd;
        w->poll.data = *at = w;
    }
    uv_poll_start(&w->poll,
                  (events & LLMCB_READ ? UV_READABLE : 0) |
                      (events & LLMCB_WRITE ? UV_WRITABLE : 0),
                  on_fd);
}

static uv_timer_t timer;

static void on_timer(uv_timer_t *t)
{
    (void)t;
    llmcb_loop_timer_event(loop);
}

static void host_timer(void *user, int64_t ms)
{
    (void)user;
    if (ms < 0)
        uv_timer_stop(&timer);
    else
        uv_timer_start(&timer, on_timer, (uint64_t)ms, 0);
}

static int print_token(llmcb_handler *self, const llmcb_event *ev)
{
    (void)self;
    llmcb_str_print(ev->token->text, stdout);
    return 0;
}

static unsigned ticks;

static void tick(uv_timer_t *t)
{
    (void)t;
    ticks++;
}

/* Stops libuv once the answer is there. */
static llmcb_step stop_after(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await(t, (llmcb_op *)t->self));
    uv_stop(uv_default_loop());
    LLMCB_END(t);
}

int main(int argc, char **argv)
{
    uv_loop_t *uv = uv_default_loop();
    llmcb_host host = { host_watch, host_timer, uv };
    llmcb_handler printer = { .sync = { .on_llm_new_token = print_token },
                              .flags = LLMCB_INLINE };
    llmcb_handler *callbacks[] = { &printer };
    llmcb_chat_desc desc = { .model = "gpt-4o-mini",
                             .streaming = true,
                             .callbacks = callbacks,
                             .n_callbacks = 1 };
    llmcb_message question = { .role = LLMCB_USER,
                               .content = "Tell me a joke" };
    llmcb_chat *chat;
    llmcb_op *op, *stop;
    llmcb_code code;
    uv_timer_t ticker;

    loop = llmcb_loop_new(NULL);
    if (argc == 3 && strcmp(argv[1], "--replay") == 0) {
        llmcb_replay_desc recording = { .path = argv[2] };
        desc.transport = llmcb_replay_new(loop, &recording);
    }
    if (argc != 1 && !desc.transport) {
        fprintf(stderr, "usage: embed_uv [--replay FILE]\n");
        llmcb_loop_free(loop);
        return 2;
    }
    uv_timer_init(uv, &timer);
    uv_timer_init(uv, &ticker);
    uv_timer_start(&ticker, tick, 1, 1);
    llmcb_loop_set_host(loop, &host);

    chat = llmcb_chat_new(loop, &desc);
    op = llmcb_chat_generate(chat, &question, 1, NULL);
    stop = llmcb_task_start(loop, stop_after, 0, op);
    uv_run(uv, UV_RUN_DEFAULT);

    code = llmcb_op_code(op);
    if (code != LLMCB_OK)
        fprintf(stderr, "%s\n", llmcb_op_error(op)->message);
    else
        printf("\n(libuv ticked %s)\n", ticks ? "meanwhile" : "not at all");

    llmcb_op_free(stop);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_set_host(loop, NULL); /* forgets what it watched */
    llmcb_loop_free(loop);
    uv_close((uv_handle_t *)&timer, NULL);
    uv_close((uv_handle_t *)&ticker, NULL);
    uv_run(uv, UV_RUN_DEFAULT); /* closes them */
    uv_loop_close(uv);
    return code == LLMCB_OK ? 0 : 1;
}
