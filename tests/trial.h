/* A trial: one loop with all counted, a chat with a handler of each kind, a
 * server or recording that behaves badly; and after it the contract T1 to T9
 * of the fault catalogue, checked in one place:
 *
 *     trial t;
 *     trial_begin(&t, SOCK, scripts, n);   and change t.ld, t.cd
 *     trial_open(&t);
 *     trial_ask(&t);
 *     trial_finish(&t, "start|Hel|lo|error:EIO", LLMCB_EIO);
 *     trial_end(&t);
 *
 * The last script is for the clean request that trial_end makes. */
#ifndef TRIAL_H
#define TRIAL_H

#include "sys.h"
#include "server.h"
#include "scene.h"

#define KEY "sk-canary-4f1d9b7c2e"
#define PROMPT "canary-prompt-77ab"
#undef DONE
#undef ALL
#define EVERYBODY 1000000u /* of a gate */

#define OK "HTTP/1.1 200 OK\r\n"
#define SSE OK "Content-Type: text/event-stream\r\n"
#define EV(t)                                                               \
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" t "\"}}]}" \
    "\n\n"
#define FIN                                                            \
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":" \
    "\"stop\"}]}\n\n"
#define DONE "data: [DONE]\n\n"
#define TWO EV("Hel") EV("lo")
#define HELLO SSE "Connection: close\r\n\r\n" TWO FIN DONE
#define CLEAN SSE "Content-Length: 81\r\n\r\n" EV("clean") DONE ": end\n"
#define CLEAN_KEPT SSE "Content-Length: 75\r\n\r\n" EV("clean") DONE

enum { REPLAY, SOCK, CURL_T, N_TRANSPORTS };

typedef struct trial {
    int transport;
    heap heap;
    int fds, own_fds, own_threads;
    llmcb_loop_desc ld;
    llmcb_chat_desc cd;
    server *server;
    llmcb_recording tapes[16];
    llmcb_segment segments[16][16];
    size_t n_tapes;
    llmcb_loop *loop;
    llmcb_transport *tr;
    llmcb_chat *chat;
    rec *r[3];
    llmcb_handler *callbacks[3];
    llmcb_op *op;
    pthread_mutex_t log_lock;
    char log[8192]; /* of the loop */
    size_t turns;   /* that the call may take */
    bool no_clean;  /* there is no further script */
    bool unsure;    /* whether the first script was used up */
} trial;

static inline void trial_log(void *user, const char *line)
{
    trial *t = (trial *)user;
    size_t n = strlen(t->log);

    snprintf(t->log + n, sizeof t->log - n, "%s\n", line);
}

/* The server is another's, and goes on: nobody's descriptors are counted but
 * the library's. */
static bool trial_shared;

static inline int open_fds(void)
{
    int n = 0, fd;

    for (fd = 0; fd < 512; fd++)
        if (fcntl(fd, F_GETFD) >= 0) n++;
    return n;
}

static inline server_script script(const char *bytes, server_end end)
{
    server_script s;

    memset(&s, 0, sizeof s);
    s.bytes = bytes;
    s.end = end;
    return s;
}

static inline llmcb_replay_end tape_end(server_end end)
{
    switch (end) {
    case SERVER_CLOSE:
    case SERVER_ACCEPT_CLOSE: return LLMCB_REPLAY_CLOSE;
    case SERVER_RST:
    case SERVER_ACCEPT_RST: return LLMCB_REPLAY_RESET;
    default: return LLMCB_REPLAY_KEEP;
    }
}

/* n 0: no server. */
static inline void trial_begin(trial *t, int transport, const server_script *s,
                               size_t n)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    size_t i, k;

    memset(t, 0, sizeof *t);
    sys_plan(SYS_N, 0, false, 0);
    sys.blocking_opens = sys.unknown_closes = 0;
    sys.still = false;
    t->transport = transport;
    pthread_mutex_init(&t->heap.m, NULL);
    t->fds = trial_shared ? 0 : open_fds();
    t->own_fds = sys.fds;
    t->own_threads = sys.threads;
    t->turns = 20000;
    for (i = 0; i < 3; i++) {
        t->r[i] = rec_new(i == 0 ? "I" : i == 1 ? "A" : "S", modes[i]);
        t->callbacks[i] = &t->r[i]->h;
    }
    t->ld.allocator.resize = heap_resize;
    t->ld.allocator.user = &t->heap;
    t->ld.virtual_clock = transport == REPLAY;
    t->ld.log = trial_log;
    t->ld.log_user = t;
    t->ld.workers = 2;
    t->cd.api_key = KEY;
    t->cd.model = "m";
    t->cd.streaming = true;
    t->cd.max_retries = -1;
    t->cd.base_url = "http://127.0.0.1/v1";
    t->cd.callbacks = t->callbacks;
    t->cd.n_callbacks = 3;
    if (transport != REPLAY && n) {
        t->server = server_start(s, n);
        if (!t->server) abort();
        t->cd.base_url = server_base(t->server);
    }
    for (i = 0; transport == REPLAY && i < n && i < 16; i++) {
        t->tapes[i].bytes = s[i].bytes ? s[i].bytes : "";
        t->tapes[i].len = s[i].len ? s[i].len : strlen(t->tapes[i].bytes);
        t->tapes[i].end = tape_end(s[i].end);
        for (k = 0; k < s[i].n_segments && k < 15; k++) {
            t->segments[i][k + 1].offset = s[i].segments[k].offset;
            t->segments[i][k + 1].delay_ms = s[i].segments[k].delay_ms;
        }
        t->tapes[i].segments = t->segments[i];
        t->tapes[i].n_segments = s[i].n_segments ? s[i].n_segments + 1 : 0;
        t->n_tapes = i + 1;
    }
}

static inline llmcb_transport *trial_transport(trial *t)
{
    llmcb_replay_desc d;

    memset(&d, 0, sizeof d);
    d.recordings = t->tapes;
    d.n_recordings = t->n_tapes;
    if (t->transport == REPLAY) return llmcb_replay_new(t->loop, &d);
    return t->transport == SOCK ? llmcb_socket_transport(t->loop)
                                : llmcb_curl_transport(t->loop);
}

/* Whether all of it could be made. */
static inline bool trial_open(trial *t)
{
    t->loop = llmcb_loop_new(&t->ld);
    t->tr = trial_transport(t);
    t->cd.transport = t->tr;
    if (t->tr) t->chat = llmcb_chat_new(t->loop, &t->cd);
    return t->chat != NULL;
}

static const llmcb_message question = { .role = LLMCB_USER, .content = PROMPT };

static inline void trial_ask(trial *t)
{
    t->op = llmcb_chat_generate(t->chat, &question, 1, NULL);
}

/* The same loop and transport, another address. */
static inline void trial_move(trial *t, const char *base)
{
    llmcb_op_free(t->op);
    t->op = NULL;
    llmcb_chat_free(t->chat);
    t->cd.base_url = base;
    t->chat = llmcb_chat_new(t->loop, &t->cd);
}

static inline bool has_canary(const char *s)
{
    return strstr(s, "canary") || strstr(s, "sk-c");
}

static inline void check_no_canary(const llmcb_error *e)
{
    CHECK(!has_canary(e->message));
    CHECK(!has_canary(e->type));
    CHECK(!has_canary(e->provider_code));
    CHECK(!has_canary(e->request_id));
    if (e->code != LLMCB_OK) CHECK(e->message[0] != '\0');
}

static inline void trial_turn(trial *t)
{
    llmcb_loop_run_once(t->loop, LLMCB_FOREVER);
}

/* Turns until the inline handler is done with that many events. */
static inline void trial_until_one(trial *t, unsigned events)
{
    size_t n = 0;

    while (t->r[0]->done < events && !llmcb_op_done(t->op) && n++ < t->turns &&
           !sys.hung)
        trial_turn(t);
    CHECK_INT(t->r[0]->done, events);
}

/* ... all are, and the loop knows. A worker that is done does not wake the
 * loop for it, so this does not wait for long. */
static inline void trial_until(trial *t, unsigned events)
{
    size_t n = 0, i;

    trial_until_one(t, events);
    if (t->transport == REPLAY) return; /* turns would move its clock */
    for (i = 0; i < 3; i++) {
        unsigned done = 0;
        while (done < events && n++ < t->turns && !sys.hung) {
            pthread_mutex_lock(&t->r[i]->m);
            done = t->r[i]->done;
            pthread_mutex_unlock(&t->r[i]->m);
            if (done < events) llmcb_loop_run_once(t->loop, 1);
        }
    }
    for (i = 0; i < 3; i++)
        llmcb_loop_run_once(t->loop, 0);
}

/* T8, T9: it ends, in turns that have a cause. */
static inline void trial_wait(trial *t)
{
    size_t n = 0;

    while (!llmcb_op_done(t->op) && n++ < t->turns && !sys.hung)
        trial_turn(t);
    if (sys.hung || n > t->turns) {
        TEST_FAIL("%s", sys.hung ? "it hangs" : "it spins");
        llmcb_op_cancel(t->op);
        for (n = 0; !llmcb_op_done(t->op) && n < 1000; n++)
            llmcb_loop_run_once(t->loop, 10);
    }
}

/* T1, T2, T3, T7. log: what each handler was told, NULL: anything that is a
 * whole run or nothing. */
static inline void trial_check(trial *t, const char *log)
{
    llmcb_code code = llmcb_op_code(t->op);
    const llmcb_error *e = llmcb_op_error(t->op);
    size_t i;

    check_no_canary(e);
    CHECK_INT(e->code, code);
    for (i = 0; i < 3; i++) {
        rec *r = t->r[i];

        CHECK_REC(r);
        if (log) CHECK_STR(r->log, log);
        if (r->starts && code == LLMCB_OK) CHECK(strstr(r->log, "|end"));
        if (r->starts && code != LLMCB_OK) CHECK(strstr(r->log, "|error:"));
        CHECK(r->starts <= 1);
        CHECK(!has_canary(r->log));
    }
    if (t->op) CHECK_INT(llmcb_op_result(t->op)->complete, code == LLMCB_OK);
}

static inline void trial_forget(trial *t)
{
    size_t i;

    for (i = 0; i < 3; i++) {
        rec *r = t->r[i];
        *r->log = '\0';
        r->len = r->n_runs = 0;
        memset(r->runs, 0, sizeof r->runs);
        r->starts = r->finishes = r->events = r->done = 0;
        r->skipped = 0;
    }
}

static inline void trial_finish(trial *t, const char *log, llmcb_code code)
{
    trial_wait(t);
    trial_check(t, log);
    CHECK_STR(llmcb_code_name(llmcb_op_code(t->op)), llmcb_code_name(code));
}

/* T3 and T6: nothing comes behind, and the loop does its work. */
static inline void trial_clean(trial *t)
{
    int i;
    unsigned n = t->r[0]->events;

    llmcb_op_free(t->op);
    t->op = NULL;
    for (i = 0; i < 3; i++)
        llmcb_loop_run_once(t->loop, 0);
    CHECK_INT(t->r[0]->events, n);
    if (!t->chat || t->no_clean) return;
    if (t->unsure) {
        llmcb_recording tape;
        llmcb_replay_desc d;

        memset(&tape, 0, sizeof tape);
        memset(&d, 0, sizeof d);
        tape.bytes = CLEAN;
        tape.len = strlen(CLEAN);
        d.recordings = &tape;
        d.n_recordings = 1;
        llmcb_chat_free(t->chat);
        t->cd.transport = llmcb_replay_new(t->loop, &d);
        t->chat = llmcb_chat_new(t->loop, &t->cd);
    }
    trial_forget(t);
    trial_ask(t);
    trial_finish(t, NULL, LLMCB_OK);
    for (i = 0; i < 3; i++)
        CHECK(strstr(t->r[i]->log, "start|clean|"));
    llmcb_op_free(t->op);
    t->op = NULL;
}

/* T5. */
static inline void trial_close(trial *t)
{
    size_t i;

    llmcb_op_free(t->op);
    llmcb_chat_free(t->chat);
    CHECK_INT(llmcb_loop_free(t->loop), LLMCB_OK);
    server_stop(t->server);
    CHECK_INT(t->heap.blocks, 0);
    CHECK_INT(t->heap.bytes, 0);
    CHECK(!t->heap.wrong);
    /* libcurl does not close all through its callback */
    if (t->transport != CURL_T) CHECK_INT(sys.fds, t->own_fds);
    sys.fds = t->own_fds;
    CHECK_INT(sys.unknown_closes, 0);
    CHECK_INT(sys.threads, t->own_threads);
    if (!trial_shared) CHECK_INT(open_fds(), t->fds);
    CHECK(!has_canary(t->log));
    for (i = 0; i < 3; i++)
        free(t->r[i]);
    pthread_mutex_destroy(&t->heap.m);
}

static inline void trial_end(trial *t)
{
    trial_clean(t);
    trial_close(t);
}

/* A transport of the program's that passes on another address. */
typedef struct bend {
    llmcb_transport base;
    llmcb_transport *inner;
    llmcb_request other; /* one at a time: it must last as long as it */
    const char *url;
} bend;

static inline llmcb_code bend_start(llmcb_transport *tr, llmcb_exchange *x,
                             const llmcb_request *q)
{
    bend *b = (bend *)(void *)tr;

    b->other = *q;
    b->other.url = b->url;
    return b->inner->start(b->inner, x, &b->other);
}

static inline void bend_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    ((bend *)(void *)tr)->inner->resume(((bend *)(void *)tr)->inner, x);
}

static inline void bend_release(llmcb_transport *tr, llmcb_exchange *x)
{
    ((bend *)(void *)tr)->inner->release(((bend *)(void *)tr)->inner, x);
}

static inline void bend_cancel(llmcb_transport *tr, llmcb_exchange *x)
{
    ((bend *)(void *)tr)->inner->cancel(((bend *)(void *)tr)->inner, x);
}

/* The trial's chat then goes that way. */
static inline void trial_bend(trial *t, bend *b)
{
    memset(b, 0, sizeof *b);
    b->base.state_size = t->tr->state_size;
    b->base.start = bend_start;
    b->base.resume = bend_resume;
    b->base.release = bend_release;
    b->base.cancel = bend_cancel;
    b->inner = t->tr;
    CHECK_INT(llmcb_transport_init(t->loop, &b->base), LLMCB_OK);
    llmcb_chat_free(t->chat);
    t->cd.transport = &b->base;
    t->chat = llmcb_chat_new(t->loop, &t->cd);
}

/* Where connections are taken, but next to nothing of what is sent on them:
 * the test accepts. */
static inline int listen_narrowly(char *base, size_t cap)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0), small = 4096;
    struct sockaddr_in a;
    socklen_t len = sizeof a;

    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) != 0 || listen(fd, 4) != 0 ||
        getsockname(fd, (struct sockaddr *)&a, &len) != 0)
        abort();
    fcntl(fd, F_SETFL, O_NONBLOCK);
    snprintf(base, cap, "http://127.0.0.1:%d/v1", (int)ntohs(a.sin_port));
    return fd;
}

/* The clock that the library sees goes on. */
static inline void pass_ms(trial *t, int64_t ms)
{
    if (t->transport == REPLAY)
        llmcb_clock_advance(t->loop, ms);
    else
        sys.mono_ms += ms;
    llmcb_loop_run_once(t->loop, 0);
    llmcb_loop_run_once(t->loop, 0);
}

#ifdef LLMCB_NO_CURL
#define TEST_ON_CURL(name)
#else
#define TEST_ON_CURL(name) \
    TEST(name##_curl)      \
    {                      \
        name(CURL_T);      \
    }
#endif
#define TEST_ON_NET(name)            \
    static void name(int transport); \
    TEST(name##_sock)                \
    {                                \
        name(SOCK);                  \
    }                                \
    TEST_ON_CURL(name)               \
    static void name(int transport)
#define TEST_ON_ALL(name)            \
    static void name(int transport); \
    TEST(name##_replay)              \
    {                                \
        name(REPLAY);                \
    }                                \
    TEST(name##_sock)                \
    {                                \
        name(SOCK);                  \
    }                                \
    TEST_ON_CURL(name)               \
    static void name(int transport)
#endif
