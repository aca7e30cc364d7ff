/*
 * llmcb.h - v0.1.0 - LangChain's async callbacks, in one C file
 * SPDX-License-Identifier: MIT OR Unlicense (texts at the end of this file)
 *
 * A chat call to OpenAI, or to any server that speaks its protocol, and
 * every step of it told to your program's handlers. An async handler is a
 * coroutine on the loop and never blocks it. A sync handler may block: it
 * runs on a thread pool, one call at a time, so it need not be thread-safe.
 *
 * HOW TO USE IT
 *
 *   In one C or C++ file, before any other include:
 *
 *       #define LLMCB_IMPLEMENTATION
 *       #include "llmcb.h"
 *
 *   In all others just #include "llmcb.h". Link with -lpthread -lcurl, or
 *   define LLMCB_NO_CURL and link with -lpthread alone.
 *
 *       #define LLMCB_IMPLEMENTATION
 *       #include "llmcb.h"
 *       #include <stdio.h>
 *
 *       static int print_token(llmcb_handler *h, const llmcb_event *ev)
 *       {
 *           (void)h;
 *           printf("%s", ev->token->text.ptr);
 *           return 0;
 *       }
 *
 *       int main(void)
 *       {
 *           llmcb_handler h = { .sync = { .on_llm_new_token = print_token } };
 *           llmcb_handler *callbacks[] = { &h };
 *           llmcb_loop *loop = llmcb_loop_new(NULL);
 *           llmcb_chat *chat = llmcb_chat_new(loop, &(llmcb_chat_desc){
 *               .streaming = true, .callbacks = callbacks,
 *               .n_callbacks = 1 });
 *           llmcb_op *op = llmcb_chat_generate(chat, &(llmcb_message){
 *               .role = LLMCB_USER, .content = "Tell me a joke" }, 1, NULL);
 *           if (llmcb_op_wait(op) != LLMCB_OK)
 *               fprintf(stderr, "%s\n", llmcb_op_error(op)->message);
 *           llmcb_op_free(op);
 *           llmcb_chat_free(chat);
 *           llmcb_loop_free(loop);
 *       }
 *
 * CONTENTS (search for the tag)
 *
 *   [BASE]   errors, allocator, strings, buffers, clock, ids
 *   [JSON]   pull reader over bytes in place, writer into a buffer
 *   [SSE]    event-stream framer
 *   [LOOP]   poll set, timers, wake-up, posts, embedding
 *   [TASK]   operations and coroutines: awaits, join, cancel
 *   [EXEC]   thread pool, offload
 *   [RUN]    runs, configuration, the event log
 *   [CALL]   handlers, cursors, dispatch
 *   [HTTP]   transport interface, HTTP/1.1 response parser, retry rules
 *   [SOCK]   transport: plain HTTP/1.1 over TCP and unix sockets
 *   [CURL]   transport: libcurl (the default)
 *   [REPLAY] transport: play a recorded response, record another transport
 *   [WIRE]   the OpenAI dialect: request body out, stream events in
 *   [CHAT]   generate, batch, stream, cancel
 *
 * GUARANTEES
 *
 *   1. Order. A handler sees the events of one run in order, never two at
 *      once, and nothing after the run's end or error event.
 *   2. Start and finish are barriers. The request leaves when every handler
 *      is done with the start event. The end or error event is delivered
 *      when every handler is done with all earlier events, and the call
 *      completes when every handler is done with it.
 *   3. Isolation. Between the barriers a slow handler delays nobody until
 *      the window is full. LLMCB_AWAIT_EACH asks for LangChain's lock step
 *      instead: the run's next event waits for that handler.
 *   4. Bounded and lossless. A run holds at most a window of undelivered
 *      events and bytes; at the window the transport is paused. Success,
 *      server faults, transport faults and timeouts deliver everything that
 *      came before them. Only cancel and freeing the loop skip what no
 *      handler was given yet, and the error event counts what was skipped.
 *   5. Safe by default. Over all runs of a loop a sync handler is never
 *      entered by two threads at once. LLMCB_PARALLEL lifts that across
 *      runs, never within one. A handler shared by two loops must be
 *      thread-safe.
 *   6. Exactly one finish for every run that started: also on cancel,
 *      timeout, a raising handler, no memory, or the loop being freed.
 *   7. No allocation a token in steady state.
 *
 * RULES
 *
 *   Threads    A loop and all that belongs to it is used by one thread.
 *              From any thread: llmcb_loop_post, llmcb_loop_wakeup,
 *              llmcb_op_cancel (the last two also from a signal handler),
 *              llmcb_run_text and llmcb_run_custom inside a sync handler.
 *   Callbacks  Cancel and free are legal inside every callback; what is in
 *              use is destroyed later. Running or freeing the loop inside a
 *              callback returns LLMCB_ESTATE. Callbacks must not throw or
 *              longjmp. A start function never calls back before it returns.
 *   Memory     Descriptors are read during the call and their strings are
 *              copied. Handlers are the caller's structs and must outlive
 *              the runs that use them; after llmcb_op_free of a live
 *              operation, until llmcb_loop_free has returned LLMCB_OK.
 *              Event payloads are valid until the handler is done with that
 *              event: a coroutine until it ends.
 *   Errors     LLMCB_OK is 0, the rest is negative. Every function takes
 *              NULL for an object and then does nothing or says
 *              LLMCB_ENOMEM, so a program may check once, at the end.
 *   Fork       The child of a fork may only free the loop.
 *
 * SWITCHES (define them in the file that has LLMCB_IMPLEMENTATION)
 *
 *   LLMCB_STATIC       all functions static; define it wherever included
 *   LLMCB_API          prefix of every public declaration, e.g. dllexport
 *   LLMCB_ASSERT(x)    check of internal rules; empty unless defined
 *   LLMCB_NO_CURL      no libcurl: plain sockets only, https is an error
 *   LLMCB_NO_SOCKETS   no plain-socket transport
 *   LLMCB_NO_EPOLL     poll(2) on Linux too
 *   LLMCB_NO_STDIO     no llmcb_result_print, no files in [REPLAY]; define
 *                      it wherever included
 *   LLMCB_ALLOW_INSECURE_TLS   makes llmcb_chat_desc.insecure_tls work
 *   LLMCB_MALLOC LLMCB_REALLOC LLMCB_FREE   all three or none
 *
 *   With -std=c99 or -std=c11 on glibc the implementation needs POSIX:
 *   include this file first, or compile with -D_POSIX_C_SOURCE=200809L.
 */
#if defined(LLMCB_IMPLEMENTATION) && defined(__STRICT_ANSI__) && \
    !defined(_POSIX_C_SOURCE) && !defined(_XOPEN_SOURCE) && \
    !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE) && \
    !defined(__APPLE__) && !defined(__FreeBSD__) && \
    !defined(__NetBSD__) && !defined(__OpenBSD__)
#define _POSIX_C_SOURCE 200809L
#endif

#ifndef LLMCB_H
#define LLMCB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifndef LLMCB_NO_STDIO
#include <stdio.h>
#endif

#define LLMCB_VERSION_MAJOR 0
#define LLMCB_VERSION_MINOR 1
#define LLMCB_VERSION_PATCH 0
#define LLMCB_VERSION "0.1.0"

#ifndef LLMCB_API
#if defined(LLMCB_STATIC) && defined(__GNUC__)
#define LLMCB_API static __attribute__((unused))
#elif defined(LLMCB_STATIC)
#define LLMCB_API static
#else
#define LLMCB_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ==== [BASE] errors, allocator, strings ================================ */

/* What every call returns. The numbers are stable. */
typedef enum llmcb_code {
    LLMCB_OK = 0,
    LLMCB_ENOMEM = -1,     /* out of memory */
    LLMCB_EINVAL = -2,     /* a bad argument, refused before anything ran */
    LLMCB_ESTATE = -3,     /* the call is not legal here or now */
    LLMCB_ECANCELLED = -4, /* cancelled by the program; see detail */
    LLMCB_ETIMEDOUT = -5,  /* a time limit; see detail */
    LLMCB_EDNS = -6,       /* the host's name could not be resolved */
    LLMCB_ECONNECT = -7,   /* no connection to the server */
    LLMCB_ETLS = -8,       /* TLS: handshake or certificate */
    LLMCB_EIO = -9,        /* the connection broke */
    LLMCB_ETRUNCATED = -10, /* the answer ended before it was complete */
    LLMCB_EHTTP = -11,      /* an HTTP status that is no success */
    LLMCB_EAPI = -12,       /* the server reported an error in its answer */
    LLMCB_EPROTO = -13,     /* not valid HTTP, or not this protocol */
    LLMCB_ECTYPE = -14,     /* a content type or encoding not asked for */
    LLMCB_EREDIRECT = -15,  /* a redirect; none is ever followed */
    LLMCB_EJSON = -16,      /* not valid JSON */
    LLMCB_EUTF8 = -17,      /* text of the program that is not UTF-8 */
    LLMCB_ELIMIT = -18,     /* a limit of llmcb_limits; the message says which */
    LLMCB_EHANDLER = -19,   /* a handler flagged LLMCB_RAISE failed */
    LLMCB_EBUSY = -20,      /* no room now; try again later */
    LLMCB_ESYS = -21,       /* a system call failed; see sys_errno */
    LLMCB_EFORK = -22       /* the loop belongs to the parent process */
} llmcb_code;

/* What kind of LLMCB_ETIMEDOUT or LLMCB_ECANCELLED it was. */
typedef enum llmcb_detail {
    LLMCB_DETAIL_NONE,
    LLMCB_DETAIL_CONNECT,    /* no connection within connect_ms */
    LLMCB_DETAIL_FIRST_BYTE, /* no answer within first_byte_ms */
    LLMCB_DETAIL_IDLE,       /* no event with data for idle_ms */
    LLMCB_DETAIL_TOTAL,      /* the whole call took longer than total_ms */
    LLMCB_DETAIL_HANDLER,    /* a handler took longer than handler_ms */
    LLMCB_DETAIL_CALLER,     /* llmcb_op_cancel */
    LLMCB_DETAIL_CONSUMER,   /* llmcb_op_free of a call under way */
    LLMCB_DETAIL_LOOP        /* llmcb_loop_free */
} llmcb_detail;

/* Bytes with their length. Strings that the library hands out also have a
 * NUL behind the last byte, and may hold NUL bytes before it. */
typedef struct llmcb_str {
    const char *ptr;
    size_t len;
} llmcb_str;

/* What went wrong. No member ever holds a key, a header value of the
 * request or text of the conversation; `message` may quote what a server
 * said of the error, with control characters replaced. */
typedef struct llmcb_error {
    llmcb_code code;
    llmcb_detail detail;
    int http_status;        /* 0: no answer came */
    int sys_errno;          /* 0: no system call was to blame */
    int attempt;            /* 1 for the first try */
    int64_t retry_after_ms; /* the server's wish; -1: none */
    char type[48];          /* the provider's error type, "" if none */
    char provider_code[48]; /* the provider's error code, "" if none */
    char request_id[64];    /* the server's x-request-id, "" if none */
    char message[256];      /* one line for people; never empty */
    /* The first failure is above; when a LLMCB_RAISE handler failed on top
     * of it, its return value is here, else 0. */
    int handler_result;
} llmcb_error;

/* One function for all three: ptr NULL allocates, size 0 frees and returns
 * NULL, else resizes. old_size is the size that was asked for. Called from
 * the loop's thread and from its workers. */
typedef struct llmcb_allocator {
    void *(*resize)(void *user, void *ptr, size_t old_size, size_t size);
    void *user;
} llmcb_allocator;

/* A duration without end, for members that are milliseconds. */
#define LLMCB_FOREVER ((int64_t)-1)

/* The library's version, LLMCB_VERSION of the implementation. Any thread. */
LLMCB_API const char *llmcb_version(void);

/* The enum's name, such as "LLMCB_ETIMEDOUT". Static. Any thread. */
LLMCB_API const char *llmcb_code_name(llmcb_code code);

/* A sentence for people. Static. Any thread. */
LLMCB_API const char *llmcb_code_text(llmcb_code code);

/* ==== [LOOP] the event loop ============================================ */

typedef struct llmcb_loop llmcb_loop;
typedef struct llmcb_op llmcb_op;
typedef struct llmcb_transport llmcb_transport;
struct pollfd;

/* Zero is the default of every member. */
typedef struct llmcb_loop_desc {
    llmcb_allocator allocator; /* default: LLMCB_REALLOC and LLMCB_FREE */
    unsigned workers;          /* pool threads, 2 to 64; default 4 */
    size_t worker_stack;       /* bytes; default 256 KiB */
    bool virtual_clock;        /* time jumps when there is nothing to do */
    int64_t shutdown_ms;       /* how long llmcb_loop_free waits for blocking
                                  functions; default 5000 */
    /* Told of what would else be lost, such as a failing handler: one line,
     * no newline. Loop thread. */
    void (*log)(void *user, const char *line);
    void *log_user;
} llmcb_loop_desc;

/* What a host loop may be asked to watch. */
#define LLMCB_READ 1
#define LLMCB_WRITE 2

/* Push embedding: how a host loop is told what to watch. */
typedef struct llmcb_host {
    /* Watch fd for events (LLMCB_READ, LLMCB_WRITE, both); 0: forget it. */
    void (*watch)(void *user, int fd, int events);
    /* Call llmcb_loop_timer_event once after ms milliseconds, replacing an
     * earlier wish; 0: as soon as possible, but not inside this call;
     * -1: no timer. */
    void (*timer)(void *user, int64_t ms);
    void *user;
} llmcb_host;

/* A new loop that belongs to the calling thread; it may be handed to
 * another before its first use. NULL desc: all defaults. NULL: no memory or
 * no descriptors. Starts no thread until one is needed. */
LLMCB_API llmcb_loop *llmcb_loop_new(const llmcb_loop_desc *desc);

/* Cancels every operation, delivers the finish events that are due, joins
 * the pool and frees the loop with its transports and what is left of its
 * operations. Chats must be freed before. LLMCB_ESTATE: called inside a
 * callback, nothing was done. LLMCB_ETIMEDOUT: a blocking function did not
 * return within shutdown_ms; what it uses was leaked. In the child of a
 * fork: closes descriptors and frees memory, tells nobody, LLMCB_EFORK. */
LLMCB_API llmcb_code llmcb_loop_free(llmcb_loop *loop);

/* Runs until no operation is left under way or llmcb_loop_stop was called. */
LLMCB_API llmcb_code llmcb_loop_run(llmcb_loop *loop);

/* Runs until `op` is done; its result, as llmcb_op_wait. */
LLMCB_API llmcb_code llmcb_loop_run_until(llmcb_loop *loop, llmcb_op *op);

/* One turn: waits at most max_ms (0: not at all, LLMCB_FOREVER: until
 * something happens), then handles what is ready. */
LLMCB_API llmcb_code llmcb_loop_run_once(llmcb_loop *loop, int64_t max_ms);

/* Makes llmcb_loop_run return after the present turn. */
LLMCB_API void llmcb_loop_stop(llmcb_loop *loop);

/* Whether an operation is under way. */
LLMCB_API bool llmcb_loop_alive(const llmcb_loop *loop);

/* Milliseconds on the loop's clock, as of the present turn. Not the time of
 * day; a virtual clock starts at 0. */
LLMCB_API int64_t llmcb_loop_now(const llmcb_loop *loop);

/* Moves a virtual clock forward by ms and makes due what falls in between;
 * it runs in the next turn. LLMCB_ESTATE with a real clock. */
LLMCB_API llmcb_code llmcb_clock_advance(llmcb_loop *loop, int64_t ms);

/* Runs fn(arg) on the loop's thread, in its next turn. Any thread. What is
 * still posted when the loop is freed runs then. LLMCB_ENOMEM. */
LLMCB_API llmcb_code llmcb_loop_post(llmcb_loop *loop, void (*fn)(void *arg),
                                     void *arg);

/* Ends the present or next wait of the loop. Any thread, signal-safe. */
LLMCB_API void llmcb_loop_wakeup(llmcb_loop *loop);

/* Pull embedding, three calls around the host's own poll(2):
 *
 *     int64_t ms; size_t n;
 *     llmcb_loop_prepare(loop, &ms);
 *     n = llmcb_loop_pollfds(loop, fds, cap);
 *     poll(fds, n, (int)ms);
 *     llmcb_loop_dispatch(loop, fds, n);
 *
 * prepare sets *timeout_ms to how long the host may wait: 0 whenever
 * anything is ready or changed, -1 for no limit. */
LLMCB_API llmcb_code llmcb_loop_prepare(llmcb_loop *loop,
                                        int64_t *timeout_ms);

/* Writes at most cap entries and returns how many there are. With epoll it
 * is one. */
LLMCB_API size_t llmcb_loop_pollfds(llmcb_loop *loop, struct pollfd *fds,
                                    size_t cap);

/* Handles the revents of those entries, timers and posts; n may be 0, other
 * descriptors are ignored. */
LLMCB_API llmcb_code llmcb_loop_dispatch(llmcb_loop *loop,
                                         const struct pollfd *fds, size_t n);

/* Push embedding: the host is told of every change through `host` (copied;
 * NULL ends it) and reports events with the two calls below. */
LLMCB_API llmcb_code llmcb_loop_set_host(llmcb_loop *loop,
                                         const llmcb_host *host);
LLMCB_API llmcb_code llmcb_loop_fd_event(llmcb_loop *loop, int fd,
                                         int events);
LLMCB_API llmcb_code llmcb_loop_timer_event(llmcb_loop *loop);

/* ==== [TASK] operations and coroutines ================================= */

/* An operation is anything under way: a chat call, a coroutine of yours, a
 * blocking function on the pool. The functions below serve them all. */

/* Runs the loop until op is done and returns its code. NULL: LLMCB_ENOMEM.
 * Inside a callback: LLMCB_ESTATE; coroutines use llmcb_await. */
LLMCB_API llmcb_code llmcb_op_wait(llmcb_op *op);

/* Whether op is done. NULL is done. */
LLMCB_API bool llmcb_op_done(const llmcb_op *op);

/* Asks op to end with LLMCB_ECANCELLED in the loop's next turn; what is done
 * stays as it is. A blocking function that runs already is not stopped.
 * Any thread, signal-safe; op must not be freed meanwhile. */
LLMCB_API void llmcb_op_cancel(llmcb_op *op);

/* Frees op. One that is under way is cancelled and detached: its handlers
 * still get their finish event. */
LLMCB_API void llmcb_op_free(llmcb_op *op);

/* The code alone; LLMCB_EBUSY while op is under way. */
LLMCB_API llmcb_code llmcb_op_code(const llmcb_op *op);

/* What went wrong; code LLMCB_OK if nothing did. Valid until llmcb_op_free.
 * Never NULL. */
LLMCB_API const llmcb_error *llmcb_op_error(const llmcb_op *op);

/* What a step function returns. */
typedef int llmcb_step;
#define LLMCB_DONE 0 /* finished; a negative llmcb_code: failed with it */
#define LLMCB_WAIT 1 /* what every await function returns */

/* A coroutine. Only `at`, `result`, `frame` and `self` are yours. */
typedef struct llmcb_task {
    uint32_t at;       /* resume point, 0 at the first step */
    llmcb_code result; /* how the last await ended */
    void *frame;       /* frame_size zeroed bytes that survive awaits */
    void *self;        /* what was given to llmcb_task_start */
    size_t index;      /* which one ended llmcb_await_any */
} llmcb_task;

/* A step function runs on the loop's thread until it awaits or ends. Locals
 * do not survive an await: keep what must in t->frame or t->self. */
typedef llmcb_step (*llmcb_task_fn)(llmcb_task *t);

/* The body of a step function stands between BEGIN and END; an AWAIT in
 * between returns and comes back when the awaited thing has ended, with its
 * code in t->result. One await a line, and none inside a switch of yours: a
 * lost resume point ends the task with LLMCB_ESTATE. A step function can do
 * without the macros: it switches on t->at, which it sets itself. */
#define LLMCB_BEGIN(t)  \
    switch ((t)->at) {  \
    case 0:
#define LLMCB_AWAIT(t, start)           \
    do {                                \
        (t)->at = (uint32_t)__LINE__;   \
        return (start);                 \
    case __LINE__:;                     \
    } while (0)
#define LLMCB_END(t)             \
    break;                       \
    default:                     \
        return LLMCB_ESTATE;     \
    }                            \
    return LLMCB_DONE

/* Starts a coroutine in the loop's next turn, with frame_size zeroed bytes
 * at t->frame and `self` at t->self. Its code is what its step returns. A
 * cancel ends its present await with LLMCB_ECANCELLED; it may clean up and
 * await more. NULL: no memory. */
LLMCB_API llmcb_op *llmcb_task_start(llmcb_loop *loop, llmcb_task_fn fn,
                                     size_t frame_size, void *self);

/* The loop that a coroutine runs on. */
LLMCB_API llmcb_loop *llmcb_task_loop(const llmcb_task *t);

/* The awaits. Each arms one thing, always suspends, and ends early with
 * LLMCB_ECANCELLED when the coroutine is cancelled. A bad argument ends it
 * with LLMCB_EINVAL in the next turn, a NULL op with LLMCB_ENOMEM. */

/* Until ms milliseconds have passed. */
LLMCB_API llmcb_step llmcb_sleep(llmcb_task *t, int64_t ms);

/* Until fd is ready for events (LLMCB_READ, LLMCB_WRITE) or timeout_ms have
 * passed: LLMCB_ETIMEDOUT. One await a descriptor at a time: LLMCB_EBUSY. */
LLMCB_API llmcb_step llmcb_await_fd(llmcb_task *t, int fd, int events,
                                    int64_t timeout_ms);

/* Until op is done; its code. From a handler of that same op:
 * LLMCB_ESTATE. */
LLMCB_API llmcb_step llmcb_await(llmcb_task *t, llmcb_op *op);

/* Until all n are done: LLMCB_OK, or the first code in the array that is
 * not. Until one is done: its code, its place in t->index. After timeout_ms
 * LLMCB_ETIMEDOUT; the operations go on. The array is copied. */
LLMCB_API llmcb_step llmcb_await_all(llmcb_task *t, llmcb_op *const *ops,
                                     size_t n, int64_t timeout_ms);
LLMCB_API llmcb_step llmcb_await_any(llmcb_task *t, llmcb_op *const *ops,
                                     size_t n, int64_t timeout_ms);

/* Until llmcb_op_next(op) would not wait: LLMCB_OK, also at the end. */
LLMCB_API llmcb_step llmcb_await_chunk(llmcb_task *t, llmcb_op *op);

/* Until fn(arg) has run on the pool: what it returned, if 0 or negative. A
 * cancel ends the await at once, though fn goes on: arg must outlive it. */
LLMCB_API llmcb_step llmcb_await_blocking(llmcb_task *t, int (*fn)(void *arg),
                                          void *arg);

/* ==== [EXEC] the thread pool =========================================== */

/* Runs fn(arg) on the pool; the code of the op is what it returned, 0 or
 * negative. NULL: no memory. No thread could be started: LLMCB_ESYS. */
LLMCB_API llmcb_op *llmcb_offload(llmcb_loop *loop, int (*fn)(void *arg),
                                  void *arg);

/* ==== [RUN] runs and their configuration =============================== */

typedef struct llmcb_handler llmcb_handler;
typedef struct llmcb_event llmcb_event;

/* LangChain's events, in its order. */
typedef enum llmcb_event_kind {
    LLMCB_LLM_START,
    LLMCB_CHAT_MODEL_START,
    LLMCB_LLM_NEW_TOKEN,
    LLMCB_LLM_END,
    LLMCB_LLM_ERROR,
    LLMCB_CHAIN_START,
    LLMCB_CHAIN_END,
    LLMCB_CHAIN_ERROR,
    LLMCB_AGENT_ACTION,
    LLMCB_AGENT_FINISH,
    LLMCB_TOOL_START,
    LLMCB_TOOL_END,
    LLMCB_TOOL_ERROR,
    LLMCB_RETRIEVER_START,
    LLMCB_RETRIEVER_END,
    LLMCB_RETRIEVER_ERROR,
    LLMCB_TEXT,
    LLMCB_RETRY,
    LLMCB_CUSTOM_EVENT,
    LLMCB_N_EVENTS
} llmcb_event_kind;

/* LangChain's name, such as "on_llm_new_token". Static. Any thread. */
LLMCB_API const char *llmcb_event_name(llmcb_event_kind kind);

typedef struct llmcb_pair {
    const char *key;
    const char *value;
} llmcb_pair;

/* One execution of a model. Read-only; valid as long as the event that
 * shows it, or the operation that it belongs to. */
typedef struct llmcb_run {
    char id[37];        /* a UUID, version 4 unless the caller chose it */
    char parent_id[37]; /* "" for a root */
    const char *name;   /* the run's name, else the model's class */
    const char *const *tags;
    size_t n_tags;
    const llmcb_pair *metadata;
    size_t n_metadata;
} llmcb_run;

/* The configuration of one call. It is copied when the call is made. What
 * is "local" serves this call's own runs and not its children. */
typedef struct llmcb_config {
    llmcb_handler *const *callbacks;
    size_t n_callbacks;
    llmcb_handler *const *local_callbacks;
    size_t n_local_callbacks;
    const char *const *tags;
    size_t n_tags;
    const char *const *local_tags;
    size_t n_local_tags;
    const llmcb_pair *metadata;
    size_t n_metadata;
    const llmcb_pair *local_metadata;
    size_t n_local_metadata;
    const char *run_name;     /* default: the model's class, "ChatOpenAI" */
    const char *run_id;       /* a UUID for the first run; default random */
    const char *parent_id;    /* the UUID of a parent run; default none */
    unsigned max_concurrency; /* open requests of a batch; default no limit */
} llmcb_config;

/* Adds an on_text or on_custom_event to a run that has started and is not
 * finished. The bytes are copied; it is delivered later, never inside this
 * call. Loop thread, or any thread from inside a sync handler of that run
 * while it handles an event. LLMCB_EBUSY: the run's window is full (never on
 * a worker: there the event is queued). LLMCB_ESTATE: not that moment. */
LLMCB_API llmcb_code llmcb_run_text(llmcb_run *run, llmcb_str text);
LLMCB_API llmcb_code llmcb_run_custom(llmcb_run *run, const char *name,
                                      llmcb_str data);

/* ==== [CALL] handlers and events ======================================= */

typedef enum llmcb_role {
    LLMCB_USER,
    LLMCB_ASSISTANT,
    LLMCB_SYSTEM,
    LLMCB_DEVELOPER,
    LLMCB_TOOL
} llmcb_role;

/* A call of a tool that the model wishes for. */
typedef struct llmcb_tool_call {
    llmcb_str id;
    llmcb_str name;
    llmcb_str arguments; /* JSON text, as the model wrote it */
    bool valid;          /* has a name, and arguments that are one whole JSON
                            object; never repaired */
} llmcb_tool_call;

/* One message of a conversation. */
typedef struct llmcb_message {
    llmcb_role role;
    const char *content;  /* UTF-8; NULL: none */
    size_t content_len;   /* bytes; 0: up to the NUL */
    const char *name;     /* optional */
    const char *tool_call_id; /* of a LLMCB_TOOL message */
    const llmcb_tool_call *tool_calls; /* of a LLMCB_ASSISTANT message */
    size_t n_tool_calls;
    const char *parts; /* JSON array sent as the content, for images and the
                          like; content is then what handlers are shown */
} llmcb_message;

/* Tokens as the server counted them. */
typedef struct llmcb_usage {
    bool known; /* false: the server did not say, the rest is 0 */
    int64_t input_tokens;
    int64_t output_tokens;
    int64_t total_tokens;
    int64_t cached_tokens;    /* of the input */
    int64_t reasoning_tokens; /* of the output */
} llmcb_usage;

/* A piece of a tool call. */
typedef struct llmcb_tool_delta {
    size_t index;        /* which call of the answer, 0 the first */
    llmcb_str id;        /* in the piece that opens the call, else "" */
    llmcb_str name;      /* likewise */
    llmcb_str arguments; /* to be appended */
} llmcb_tool_delta;

/* What a chunk may carry beside text. */
typedef struct llmcb_parts {
    const llmcb_tool_delta *tool_calls;
    size_t n_tool_calls;
    llmcb_str refusal;
    llmcb_str reasoning;
    llmcb_str finish_reason; /* "" unless this chunk ends its choice */
    llmcb_str logprobs;      /* JSON text, "" if none */
    llmcb_usage usage;
} llmcb_parts;

/* One piece of a streamed answer. A chunk without text is a token with
 * empty text, as in LangChain. */
typedef struct llmcb_chunk {
    llmcb_str text;
    int choice;               /* 0 unless n > 1 was asked for */
    const llmcb_parts *parts; /* never NULL */
} llmcb_chunk;

/* One candidate of an answer. */
typedef struct llmcb_generation {
    llmcb_str text;
    llmcb_str refusal;
    llmcb_str reasoning;
    llmcb_str finish_reason; /* "stop", "length", "tool_calls" ...; "": none */
    llmcb_str logprobs;      /* a JSON array of the server's; "" if none */
    const llmcb_tool_call *tool_calls;
    size_t n_tool_calls;
} llmcb_generation;

/* The answer to one conversation, or what there was of it. */
typedef struct llmcb_result {
    bool complete; /* false: partial, beside an error */
    bool sentinel; /* the stream's [DONE] was seen */
    const llmcb_generation *generations; /* one a choice */
    size_t n_generations;
    llmcb_str model_name; /* the model that served it */
    llmcb_str id;
    llmcb_str system_fingerprint;
    llmcb_usage usage;
} llmcb_result;

/* Payloads of events. */
typedef struct llmcb_start {
    const llmcb_message *messages; /* with content_len set */
    size_t n_messages;
    llmcb_str prompt;     /* "Human: ..." lines, for on_llm_start */
    const char *model;    /* the model asked for */
    size_t batch_size;    /* prompts of the same call */
    llmcb_str params;     /* JSON text: what is sent but the messages */
} llmcb_start;

typedef struct llmcb_retry {
    int attempt; /* the try that failed, 1 the first */
    int64_t delay_ms;
    const llmcb_error *error;
} llmcb_retry;

typedef struct llmcb_data {
    llmcb_str name; /* of a custom event */
    llmcb_str text; /* the text, or the custom event's data */
} llmcb_data;

/* One event, as one handler is told of it. The payload that belongs to the
 * kind is set, the others are NULL. */
struct llmcb_event {
    llmcb_event_kind kind;
    uint64_t skipped; /* error events: how many events this handler missed
                         because of a cancel */
    uint64_t seq;     /* 1, 2, ... within the run */
    llmcb_run *run;
    const llmcb_start *start;   /* *_START */
    const llmcb_chunk *token;   /* NEW_TOKEN */
    const llmcb_result *result; /* LLM_END; LLM_ERROR: the partial result */
    const llmcb_error *error;   /* *_ERROR */
    const llmcb_retry *retry;   /* RETRY */
    const llmcb_data *data;     /* TEXT, CUSTOM_EVENT */
};

/* A sync function runs on the pool and may block. Not 0: it failed, which
 * is logged, or ends the run if the handler is flagged LLMCB_RAISE. */
typedef int (*llmcb_sync_fn)(llmcb_handler *h, const llmcb_event *ev);

/* An async function is a coroutine on the loop, with frame_size bytes of
 * the handler at t->frame, zeroed for each event. */
typedef llmcb_step (*llmcb_async_fn)(llmcb_task *t, llmcb_handler *h,
                                     const llmcb_event *ev);

#define LLMCBI_EVENTS(type)         \
    type on_llm_start;              \
    type on_chat_model_start;       \
    type on_llm_new_token;          \
    type on_llm_end;                \
    type on_llm_error;              \
    type on_chain_start;            \
    type on_chain_end;              \
    type on_chain_error;            \
    type on_agent_action;           \
    type on_agent_finish;           \
    type on_tool_start;             \
    type on_tool_end;               \
    type on_tool_error;             \
    type on_retriever_start;        \
    type on_retriever_end;          \
    type on_retriever_error;        \
    type on_text;                   \
    type on_retry;                  \
    type on_custom_event;

typedef struct llmcb_sync_table {
    LLMCBI_EVENTS(llmcb_sync_fn)
} llmcb_sync_table;

typedef struct llmcb_async_table {
    LLMCBI_EVENTS(llmcb_async_fn)
} llmcb_async_table;
#undef LLMCBI_EVENTS

/* llmcb_handler.flags */
#define LLMCB_INLINE 1u     /* sync functions run on the loop's thread, before
                               the other handlers, and must not block */
#define LLMCB_AWAIT_EACH 2u /* the run's next event waits for this handler */
#define LLMCB_PARALLEL 4u   /* may be entered for several runs at once */
#define LLMCB_RAISE 8u      /* a failure of this handler fails the run */

/* llmcb_handler.skip */
#define LLMCB_SKIP_LLM 1u
#define LLMCB_SKIP_CHAIN 2u
#define LLMCB_SKIP_AGENT 4u /* agent and tool events */
#define LLMCB_SKIP_RETRIEVER 8u
#define LLMCB_SKIP_RETRY 16u
#define LLMCB_SKIP_CUSTOM 32u

/* Functions of yours, and how they wish to be called. A zero member is an
 * event that you do not care for. A handler without on_chat_model_start gets
 * on_llm_start instead, with the prompt as one text. One event may not be in
 * both tables: LLMCB_EINVAL. The struct is not copied. */
struct llmcb_handler {
    llmcb_sync_table sync;
    llmcb_async_table async;
    unsigned flags;
    unsigned skip;
    size_t frame_size; /* bytes at t->frame of the async functions */
    const char *name;  /* for the log; may be NULL */
    void *user;        /* yours */
};

/* ==== [HTTP] transports ================================================ */

/* What a transport is to send. Valid until the exchange is over. */
typedef struct llmcb_request {
    const char *method;
    const char *url;      /* http://, https:// or unix:/path:/target */
    const llmcb_pair *headers;
    size_t n_headers;
    const char *body;
    size_t body_len;
    int64_t connect_ms;   /* for dividing it among addresses */
    uint64_t identity;    /* connections are shared by equal ones only */
    const char *ca_file;  /* NULL: the system's */
    bool http2;
    bool insecure_tls;
} llmcb_request;

/* One request and its response, made by the library. */
typedef struct llmcb_exchange llmcb_exchange;

/* How a response body ended. */
typedef enum llmcb_ending {
    LLMCB_ORDERLY, /* its framing says it is complete, or it is framed by the
                      close of the connection and that was clean */
    LLMCB_CUT,     /* the connection was closed too early */
    LLMCB_BROKEN   /* any other failure: see the code */
} llmcb_ending;

/* A transport: put this struct first in one of yours. All functions are
 * called on the loop's thread, outside the transport's own calls. */
struct llmcb_transport {
    /* Bytes of llmcb_exchange_state, zeroed for each exchange. */
    size_t state_size;
    /* Begin. Later, never inside this call, call back in this order:
     * connected once, status and headers, data, end. Not LLMCB_OK: it could
     * not begin, and nothing more is called for this exchange. */
    llmcb_code (*start)(llmcb_transport *tr, llmcb_exchange *x,
                        const llmcb_request *request);
    /* Go on, after llmcb_exchange_data returned false. */
    void (*resume)(llmcb_transport *tr, llmcb_exchange *x);
    /* The response has said all that is wanted: forget x. The connection may
     * be read on a little so that it can be used again. */
    void (*release)(llmcb_transport *tr, llmcb_exchange *x);
    /* Stop at once, so that the server notices, and forget x. */
    void (*cancel)(llmcb_transport *tr, llmcb_exchange *x);
    /* The loop is being freed; no exchange is left. */
    void (*free)(llmcb_transport *tr);
    llmcb_loop *loop;      /* set by llmcb_transport_init */
    llmcb_transport *next; /* likewise */
};

/* Gives a transport of yours to a loop, which calls its free function when
 * it is freed itself. */
LLMCB_API llmcb_code llmcb_transport_init(llmcb_loop *loop,
                                          llmcb_transport *tr);

/* The transport's own bytes of an exchange. */
LLMCB_API void *llmcb_exchange_state(llmcb_exchange *x);

/* A connection stands; the request goes out. */
LLMCB_API void llmcb_exchange_connected(llmcb_exchange *x);

/* The final status, 200 to 599; not for interim responses. */
LLMCB_API void llmcb_exchange_status(llmcb_exchange *x, int status);

/* A header field; names in any case, both copied if needed. */
LLMCB_API void llmcb_exchange_header(llmcb_exchange *x, llmcb_str name,
                                     llmcb_str value);

/* Bytes of the body, transfer coding removed. All are taken; false: give no
 * more until resume is called. */
LLMCB_API bool llmcb_exchange_data(llmcb_exchange *x, const char *bytes,
                                   size_t len);

/* The response is over. For LLMCB_BROKEN the code and a text of at most 200
 * bytes say why; sys_errno or 0. x must not be used afterwards. */
LLMCB_API void llmcb_exchange_end(llmcb_exchange *x, llmcb_ending ending,
                                  llmcb_code code, int sys_errno,
                                  const char *message);

/* The plain-socket transport, for http:// and unix: addresses. Belongs to
 * the loop. NULL: no memory or LLMCB_NO_SOCKETS. */
LLMCB_API llmcb_transport *llmcb_socket_transport(llmcb_loop *loop);

/* The libcurl transport. NULL: no memory or LLMCB_NO_CURL. */
LLMCB_API llmcb_transport *llmcb_curl_transport(llmcb_loop *loop);

/* ==== [REPLAY] recordings ============================================== */

/* When bytes of a recording become available. */
typedef struct llmcb_segment {
    size_t offset;    /* of its first byte in the recording */
    int64_t delay_ms; /* after the segment before it */
} llmcb_segment;

/* What the server did after the last byte. */
typedef enum llmcb_replay_end {
    LLMCB_REPLAY_KEEP,  /* kept the connection open */
    LLMCB_REPLAY_CLOSE, /* closed it */
    LLMCB_REPLAY_RESET, /* reset it */
    LLMCB_REPLAY_REFUSE /* refused the connection: no bytes */
} llmcb_replay_end;

/* One recorded HTTP response, head and body as they were on the wire. */
typedef struct llmcb_recording {
    const char *bytes;
    size_t len;
    const llmcb_segment *segments; /* none: all at once */
    size_t n_segments;
    llmcb_replay_end end;
} llmcb_recording;

typedef struct llmcb_replay_desc {
    /* Either files: path is the first response, and NAME-2.http, NAME-3.http
     * beside NAME.http the following, as far as they exist. The write borders
     * are read from NAME.segments.json if there is one. */
    const char *path;
    /* Or responses in memory, copied. */
    const llmcb_recording *recordings;
    size_t n_recordings;
    bool no_delays; /* play as fast as it goes */
} llmcb_replay_desc;

/* A transport that answers the first request with the first recording, the
 * second with the second ..., and from then on with the last. Belongs to the
 * loop. NULL: no memory, no such file or not readable. */
LLMCB_API llmcb_transport *llmcb_replay_new(llmcb_loop *loop,
                                            const llmcb_replay_desc *desc);

/* A transport that hands everything to `inner` and writes each response to
 * path, NAME-2.http, ... with NAME.segments.json beside it, mode 0600, in a
 * form that llmcb_replay_new plays. Of the request nothing is written, of the
 * response no cookies. Belongs to the loop. NULL: no memory. */
LLMCB_API llmcb_transport *llmcb_record_new(llmcb_loop *loop,
                                            llmcb_transport *inner,
                                            const char *path);

/* ==== [CHAT] chat calls ================================================ */

typedef struct llmcb_chat llmcb_chat;

/* Bounds on what a server may send and on what waits for slow handlers. A
 * value of 0 is the default. */
typedef struct llmcb_limits {
    size_t header_line;   /* 16 KiB */
    size_t header_block;  /* 64 KiB */
    size_t header_fields; /* 128 */
    size_t event;         /* one line or event of a stream; 16 MiB */
    size_t text;          /* accumulated text of a call; 64 MiB */
    size_t arguments;     /* arguments of one tool call; 16 MiB */
    size_t tool_calls;    /* of a choice; 128 */
    size_t choices;       /* 128 */
    size_t error_body;    /* what is kept of an error answer; 64 KiB */
    size_t body;          /* 1 GiB */
    size_t window_events; /* undelivered events of a run; 1024 */
    size_t window_bytes;  /* their text; 1 MiB */
} llmcb_limits;

/* Zero is the default of every member. */
typedef struct llmcb_chat_desc {
    const char *model;        /* "gpt-4o-mini" */
    const char *base_url;     /* OPENAI_BASE_URL, else OpenAI's; or
                                 unix:/path/to/socket:/v1 */
    const char *api_key;      /* OPENAI_API_KEY; "": none */
    const char *organization; /* OPENAI_ORG_ID */
    bool streaming;           /* llmcb_chat_generate streams too */
    int max_tokens;           /* 0: the server's default */
    int n;                    /* choices; default 1 */
    const char *tools;        /* JSON array of tool definitions */
    const char *extra;        /* JSON object whose members are sent last and
                                 win: temperature, stop, seed, ... */
    bool no_usage;            /* do not ask for usage in streams */
    int max_retries;          /* default 2; negative: none */
    int64_t connect_ms;       /* 10,000 */
    int64_t first_byte_ms;    /* 600,000 */
    int64_t idle_ms;          /* 120,000; between events with data */
    int64_t total_ms;         /* none; LLMCB_FOREVER for none in all four */
    int64_t handler_ms;       /* none; how long a call waits for one handler's
                                 event before it fails */
    llmcb_limits limits;
    const llmcb_pair *headers; /* further request headers */
    size_t n_headers;
    llmcb_transport *transport; /* default: libcurl, or sockets without it */
    const char *ca_file;        /* PEM; default: the system's */
    bool http2;
    bool allow_cleartext_key;   /* send the key over http:// to other hosts
                                   than this machine */
    bool insecure_tls;          /* needs LLMCB_ALLOW_INSECURE_TLS */
    /* Serve this chat's own runs, behind those of a call. */
    llmcb_handler *const *callbacks;
    size_t n_callbacks;
    const char *const *tags;
    size_t n_tags;
    const llmcb_pair *metadata;
    size_t n_metadata;
} llmcb_chat_desc;

/* A client for one server and model. NULL: no memory. A descriptor that is
 * refused still makes a chat: llmcb_chat_error tells why, and every call
 * fails with it. Must be freed before its loop. */
LLMCB_API llmcb_chat *llmcb_chat_new(llmcb_loop *loop,
                                     const llmcb_chat_desc *desc);

/* What was wrong with the descriptor; code LLMCB_OK if nothing. Never NULL.
 * Valid until llmcb_chat_free. */
LLMCB_API const llmcb_error *llmcb_chat_error(const llmcb_chat *chat);

/* Frees the chat and wipes its copy of the key. Calls under way go on. */
LLMCB_API void llmcb_chat_free(llmcb_chat *chat);

/* Asks for the next message of one conversation; n messages, copied. The
 * answer comes whole; with `streaming` its tokens are told to handlers as
 * they come. config may be NULL. NULL: no memory. */
LLMCB_API llmcb_op *llmcb_chat_generate(llmcb_chat *chat,
                                        const llmcb_message *messages,
                                        size_t n, const llmcb_config *config);

/* The same, always streaming, for reading with llmcb_op_next. */
LLMCB_API llmcb_op *llmcb_chat_stream(llmcb_chat *chat,
                                      const llmcb_message *messages, size_t n,
                                      const llmcb_config *config);

/* One conversation of a batch. */
typedef struct llmcb_prompt {
    const llmcb_message *messages;
    size_t n;
} llmcb_prompt;

/* Several conversations as one call, LangChain's agenerate: one run each,
 * all start events first, then the requests at once, then errors in index
 * order, then ends. The code is that of the first prompt that failed; the
 * results of the others can be read all the same. */
LLMCB_API llmcb_op *llmcb_chat_batch(llmcb_chat *chat,
                                     const llmcb_prompt *prompts, size_t n,
                                     const llmcb_config *config);

/* The next chunk of a llmcb_chat_stream op, valid until the next call on op;
 * runs the loop until there is one. false: there is none any more, and the
 * op is done. Inside a callback it does not wait: false with *chunk NULL
 * also means none now; llmcb_await_chunk waits. */
LLMCB_API bool llmcb_op_next(llmcb_op *op, const llmcb_chunk **chunk);

/* The result, whole or partial; of an op that is no chat call, is NULL or is
 * still under way, an empty one. Valid until llmcb_op_free. Never NULL. */
LLMCB_API const llmcb_result *llmcb_op_result(const llmcb_op *op);

/* The same for prompt i of a batch, with its own error and run. */
LLMCB_API size_t llmcb_op_n_prompts(const llmcb_op *op);
LLMCB_API const llmcb_result *llmcb_op_result_at(const llmcb_op *op,
                                                 size_t i);
LLMCB_API const llmcb_error *llmcb_op_error_at(const llmcb_op *op, size_t i);
LLMCB_API llmcb_run *llmcb_op_run_at(const llmcb_op *op, size_t i);

/* The usage of all prompts added up; known if all are. */
LLMCB_API llmcb_usage llmcb_op_usage(const llmcb_op *op);

#ifndef LLMCB_NO_STDIO
/* Prints text, finish reason, model name and usage, for people. Control
 * characters of the text are escaped. */
LLMCB_API void llmcb_result_print(const llmcb_result *result, FILE *out);
#endif

#ifdef __cplusplus
}
#endif
#endif /* LLMCB_H */
