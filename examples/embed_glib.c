/*
 * embed_glib.c - llmcb on GLib's main loop, as in a GTK program
 *
 *     build/examples/embed_glib [--replay FILE]
 *
 * GLib runs; llmcb tells it what to watch and when to call.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <glib-unix.h>
#include <stdio.h>
#include <string.h>

static llmcb_loop *loop;
static GHashTable *watches; /* descriptor: GLib's number of the source */
static guint timer;

static gboolean on_fd(gint fd, GIOCondition seen, gpointer user)
{
    bool trouble = (seen & (G_IO_HUP | G_IO_ERR | G_IO_NVAL)) != 0;

    (void)user;
    llmcb_loop_fd_event(loop, fd,
                        (seen & G_IO_IN || trouble ? LLMCB_READ : 0) |
                            (seen & G_IO_OUT || trouble ? LLMCB_WRITE : 0));
    return G_SOURCE_CONTINUE;
}

static void host_watch(void *user, int fd, int events)
{
    gpointer key = GINT_TO_POINTER(fd);
    guint id = GPOINTER_TO_UINT(g_hash_table_lookup(watches, key));
    int wish = (events & LLMCB_READ ? G_IO_IN : 0) |
               (events & LLMCB_WRITE ? G_IO_OUT : 0);

    (void)user;
    if (id) g_source_remove(id);
    g_hash_table_remove(watches, key);
    if (!events) return;
    id = g_unix_fd_add(fd, (GIOCondition)wish, on_fd, NULL);
    g_hash_table_insert(watches, key, GUINT_TO_POINTER(id));
}

static gboolean on_timer(gpointer user)
{
    (void)user;
    timer = 0;
    llmcb_loop_timer_event(loop);
    return G_SOURCE_REMOVE;
}

static void host_timer(void *user, int64_t ms)
{
    (void)user;
    if (timer) g_source_remove(timer);
    timer =
        ms < 0 ? 0 : g_timeout_add((guint)MIN(ms, G_MAXINT), on_timer, NULL);
}

static int print_token(llmcb_handler *self, const llmcb_event *ev)
{
    (void)self;
    llmcb_str_print(ev->token->text, stdout);
    return 0;
}

/* Ends the main loop once the answer is there. */
static GMainLoop *glib;

static llmcb_step quit_after(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await(t, (llmcb_op *)t->self));
    g_main_loop_quit(glib);
    LLMCB_END(t);
}

int main(int argc, char **argv)
{
    llmcb_host host = { host_watch, host_timer, NULL };
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
    llmcb_op *op, *quit;
    llmcb_code code;

    loop = llmcb_loop_new(NULL);
    if (argc == 3 && strcmp(argv[1], "--replay") == 0) {
        llmcb_replay_desc recording = { .path = argv[2] };
        desc.transport = llmcb_replay_new(loop, &recording);
    }
    if (argc != 1 && !desc.transport) {
        fprintf(stderr, "usage: embed_glib [--replay FILE]\n");
        llmcb_loop_free(loop);
        return 2;
    }
    glib = g_main_loop_new(NULL, FALSE);
    watches = g_hash_table_new(g_direct_hash, g_direct_equal);
    llmcb_loop_set_host(loop, &host);

    chat = llmcb_chat_new(loop, &desc);
    op = llmcb_chat_generate(chat, &question, 1, NULL);
    quit = llmcb_task_start(loop, quit_after, 0, op);
    g_main_loop_run(glib);

    code = llmcb_op_code(op);
    if (code != LLMCB_OK)
        fprintf(stderr, "%s\n", llmcb_op_error(op)->message);
    else
        putchar('\n');

    llmcb_op_free(quit);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_set_host(loop, NULL); /* forgets what it watched */
    llmcb_loop_free(loop);
    g_hash_table_unref(watches);
    g_main_loop_unref(glib);
    return code == LLMCB_OK ? 0 : 1;
}
