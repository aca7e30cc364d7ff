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
 * fork: closes the loop's own descriptors, tells nobody, LLMCB_EFORK. */
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

#if defined(LLMCB_IMPLEMENTATION) && !defined(LLMCBI_IMPLEMENTED)
#define LLMCBI_IMPLEMENTED

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#ifndef LLMCB_NO_SOCKETS
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#endif
#ifndef LLMCB_NO_STDIO
#include <sys/stat.h>
#endif
#if defined(__linux__) && !defined(LLMCB_NO_EPOLL)
#define LLMCBI_EPOLL 1
#include <sys/epoll.h>
#else
#define LLMCBI_EPOLL 0
#endif
#ifndef LLMCB_NO_CURL
#include <curl/curl.h>
#endif
#ifndef CLOCK_MONOTONIC
#error "llmcb.h needs POSIX: include it first or use -D_POSIX_C_SOURCE=200809L"
#endif

#if defined(LLMCB_MALLOC) != defined(LLMCB_REALLOC) || \
    defined(LLMCB_MALLOC) != defined(LLMCB_FREE)
#error "define all of LLMCB_MALLOC, LLMCB_REALLOC and LLMCB_FREE, or none"
#endif
#ifndef LLMCB_MALLOC
#define LLMCB_MALLOC(size) malloc(size)
#define LLMCB_REALLOC(ptr, size) realloc(ptr, size)
#define LLMCB_FREE(ptr) free(ptr)
#endif
#ifndef LLMCB_ASSERT
#define LLMCB_ASSERT(x) ((void)0)
#endif

/* Every system call goes through this name, so that a test can define it
 * and make any of them fail. */
#ifndef LLMCBI_SYS
#define LLMCBI_SYS(call) call
#endif

/* The public functions are declared extern; here they get their linkage
 * from those declarations, but for LLMCB_STATIC. */
#ifdef LLMCB_STATIC
#define LLMCBI_DEF LLMCB_API
#else
#define LLMCBI_DEF
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ==== [BASE] errors, allocator, strings, buffers, clock, ids =========== */

LLMCBI_DEF const char *llmcb_version(void)
{
    return LLMCB_VERSION;
}

#define LLMCBI_CODES(X)                                               \
    X(LLMCB_OK, "no error")                                           \
    X(LLMCB_ENOMEM, "out of memory")                                  \
    X(LLMCB_EINVAL, "invalid argument")                               \
    X(LLMCB_ESTATE, "not legal in this state")                        \
    X(LLMCB_ECANCELLED, "cancelled")                                  \
    X(LLMCB_ETIMEDOUT, "timed out")                                   \
    X(LLMCB_EDNS, "the host name could not be resolved")              \
    X(LLMCB_ECONNECT, "could not connect to the server")              \
    X(LLMCB_ETLS, "TLS handshake or certificate failure")             \
    X(LLMCB_EIO, "the connection broke")                              \
    X(LLMCB_ETRUNCATED, "the answer ended before it was complete")    \
    X(LLMCB_EHTTP, "the server answered with an error status")        \
    X(LLMCB_EAPI, "the server reported an error")                     \
    X(LLMCB_EPROTO, "the server broke the protocol")                  \
    X(LLMCB_ECTYPE, "the answer has an unexpected type or encoding")  \
    X(LLMCB_EREDIRECT, "the server redirected, which is not followed") \
    X(LLMCB_EJSON, "the answer is not valid JSON")                    \
    X(LLMCB_EUTF8, "text is not valid UTF-8")                         \
    X(LLMCB_ELIMIT, "a limit was exceeded")                           \
    X(LLMCB_EHANDLER, "a handler failed")                             \
    X(LLMCB_EBUSY, "busy")                                            \
    X(LLMCB_ESYS, "a system call failed")                             \
    X(LLMCB_EFORK, "the loop belongs to the parent process")

LLMCBI_DEF const char *llmcb_code_name(llmcb_code code)
{
#define LLMCBI_CASE(name, text) \
    case name:                  \
        return #name;
    switch (code) {
        LLMCBI_CODES(LLMCBI_CASE)
    default:
        return "LLMCB_UNKNOWN";
    }
#undef LLMCBI_CASE
}

LLMCBI_DEF const char *llmcb_code_text(llmcb_code code)
{
#define LLMCBI_CASE(name, text) \
    case name:                  \
        return text;
    switch (code) {
        LLMCBI_CODES(LLMCBI_CASE)
    default:
        return "unknown error";
    }
#undef LLMCBI_CASE
}

static llmcb_str llmcbi_str(const char *s)
{
    llmcb_str r;

    r.ptr = s ? s : "";
    r.len = strlen(r.ptr);
    return r;
}

static llmcb_str llmcbi_slice(const char *ptr, size_t len)
{
    llmcb_str r;

    r.ptr = ptr;
    r.len = len;
    return r;
}

static bool llmcbi_str_is(llmcb_str s, const char *other)
{
    return strlen(other) == s.len && memcmp(s.ptr, other, s.len) == 0;
}

static char llmcbi_lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

/* ASCII case is folded in `s` only. */
static bool llmcbi_str_is_nocase(llmcb_str s, const char *lower)
{
    size_t i;

    for (i = 0; i < s.len; i++)
        if (llmcbi_lower(s.ptr[i]) != lower[i]) return false;
    return lower[i] == '\0';
}

static bool llmcbi_str_begins(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

/* Copies as much as fits, with a NUL; bytes that a terminal or a log might
 * act on become '?'. Cuts before an incomplete UTF-8 sequence. */
static void llmcbi_copy_clean(char *out, size_t cap, const char *s,
                              size_t len)
{
    size_t i, n = len < cap - 1 ? len : cap - 1;

    if (n < len)
        while (n > 0 && ((unsigned char)s[n] & 0xC0) == 0x80) n--;
    for (i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        out[i] = c < 0x20 || c == 0x7F ? ' ' : (char)c;
        /* C1 controls, which are two bytes in UTF-8 */
        if (c >= 0x80 && c < 0xA0 && i > 0 &&
            (unsigned char)s[i - 1] == 0xC2)
            out[i - 1] = out[i] = ' ';
    }
    out[n] = '\0';
}

static void *llmcbi_default_resize(void *user, void *ptr, size_t old_size,
                                   size_t size)
{
    (void)user;
    (void)old_size;
    if (size == 0) {
        LLMCB_FREE(ptr);
        return NULL;
    }
    return ptr ? LLMCB_REALLOC(ptr, size) : LLMCB_MALLOC(size);
}

static void *llmcbi_resize(const llmcb_allocator *a, void *ptr, size_t old,
                           size_t size)
{
    if (size > SIZE_MAX / 2) return NULL; /* the product of a wrong sum */
    return a->resize(a->user, ptr, ptr ? old : 0, size);
}

static void *llmcbi_alloc(const llmcb_allocator *a, size_t size)
{
    void *p = llmcbi_resize(a, NULL, 0, size);

    if (p) memset(p, 0, size);
    return p;
}

static void llmcbi_free(const llmcb_allocator *a, void *ptr, size_t size)
{
    if (ptr) a->resize(a->user, ptr, size, 0);
}

/* A wipe that the compiler does not take for a dead store. */
static void llmcbi_wipe(void *ptr, size_t size)
{
    volatile unsigned char *p = (volatile unsigned char *)ptr;

    while (size--) *p++ = 0;
}

/* A growing buffer. A failure sticks, so that a writer checks once. */
typedef struct llmcbi_buf {
    char *ptr;
    size_t len, cap;
    bool failed;
} llmcbi_buf;

static void llmcbi_buf_free(const llmcb_allocator *a, llmcbi_buf *b)
{
    llmcbi_free(a, b->ptr, b->cap);
    memset(b, 0, sizeof *b);
}

/* Room for `more` bytes and a NUL. */
static bool llmcbi_buf_reserve(const llmcb_allocator *a, llmcbi_buf *b,
                               size_t more)
{
    size_t cap = b->cap ? b->cap : 64;
    char *p;

    if (b->failed) return false;
    if (more < b->cap - b->len && b->cap) return true;
    if (more > SIZE_MAX / 4 - b->len) {
        b->failed = true;
        return false;
    }
    while (cap - b->len <= more) cap *= 2;
    p = (char *)llmcbi_resize(a, b->ptr, b->cap, cap);
    if (!p) {
        b->failed = true;
        return false;
    }
    b->ptr = p;
    b->cap = cap;
    return true;
}

static void llmcbi_buf_add(const llmcb_allocator *a, llmcbi_buf *b,
                           const char *s, size_t len)
{
    if (!llmcbi_buf_reserve(a, b, len)) return;
    if (len) memcpy(b->ptr + b->len, s, len);
    b->len += len;
    b->ptr[b->len] = '\0';
}

static void llmcbi_buf_text(const llmcb_allocator *a, llmcbi_buf *b,
                            const char *s)
{
    llmcbi_buf_add(a, b, s, strlen(s));
}

/* Decimal digits of v, with a NUL, in out[24]; returns their start. */
static const char *llmcbi_decimal(char *out, int64_t v)
{
    char *p = out + 23;
    uint64_t u = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;

    *p = '\0';
    do *--p = (char)('0' + u % 10);
    while ((u /= 10) != 0);
    if (v < 0) *--p = '-';
    return p;
}

static void llmcbi_buf_int(const llmcb_allocator *a, llmcbi_buf *b, int64_t v)
{
    char digits[24];

    llmcbi_buf_text(a, b, llmcbi_decimal(digits, v));
}

static void llmcbi_buf_drop(llmcbi_buf *b, size_t n)
{
    memmove(b->ptr, b->ptr + n, b->len - n);
    b->len -= n;
}

static llmcb_str llmcbi_buf_str(const llmcbi_buf *b)
{
    return b->len ? llmcbi_slice(b->ptr, b->len) : llmcbi_slice("", 0);
}

/* One error on its way. Where errors must outlive a function they are kept
 * behind a pointer, since they are large and rare. */
static void llmcbi_error_set(llmcb_error *e, llmcb_code code,
                             const char *message)
{
    memset(e, 0, sizeof *e);
    e->code = code;
    e->retry_after_ms = -1;
    if (!message || !*message) message = llmcb_code_text(code);
    llmcbi_copy_clean(e->message, sizeof e->message, message,
                      strlen(message));
}

/* Appends to the message, as far as it fits. */
static void llmcbi_error_add(llmcb_error *e, const char *text, size_t len)
{
    size_t used = strlen(e->message);

    llmcbi_copy_clean(e->message + used, sizeof e->message - used, text, len);
}

/* What is said when there is no memory left to say more. */
static const llmcb_error *llmcbi_error_const(llmcb_code code)
{
#define LLMCBI_ENTRY(name, text) \
    { name, LLMCB_DETAIL_NONE, 0, 0, 0, -1, "", "", "", text, 0 },
    static const llmcb_error table[] = { LLMCBI_CODES(LLMCBI_ENTRY) };
#undef LLMCBI_ENTRY
    size_t i = (size_t)-code;

    return i < sizeof table / sizeof *table ? &table[i] : &table[1];
}

/* A copy on the heap, or the constant of its code. */
static const llmcb_error *llmcbi_error_keep(const llmcb_allocator *a,
                                            const llmcb_error *e)
{
    llmcb_error *copy;

    if (e->code == LLMCB_OK) return llmcbi_error_const(LLMCB_OK);
    copy = (llmcb_error *)llmcbi_alloc(a, sizeof *copy);
    if (!copy) return llmcbi_error_const(e->code);
    *copy = *e;
    return copy;
}

static void llmcbi_error_drop(const llmcb_allocator *a, const llmcb_error *e)
{
    if (e && e != llmcbi_error_const(e->code)) {
        union {
            const llmcb_error *in;
            void *out;
        } p;
        p.in = e;
        llmcbi_free(a, p.out, sizeof *e);
    }
}

/* A flag that is set by any thread or a signal handler and read by one. C99
 * has no atomics; a byte store is one on every machine this runs on, and the
 * builtins say so to the compiler and to ThreadSanitizer. */
typedef volatile unsigned char llmcbi_flag;
#if defined(__GNUC__)
#define LLMCBI_FLAG_SET(f, v) __atomic_store_n(f, (unsigned char)(v), 5)
#define LLMCBI_FLAG_GET(f) __atomic_load_n(f, 5)
#else
#define LLMCBI_FLAG_SET(f, v) (*(f) = (unsigned char)(v))
#define LLMCBI_FLAG_GET(f) (*(f))
#endif

static int64_t llmcbi_clock_ms(void)
{
    struct timespec ts;

    LLMCBI_SYS(clock_gettime)(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* xoshiro256**: for run ids and jitter, seeded once a loop. */
typedef struct llmcbi_random {
    uint64_t s[4];
} llmcbi_random;

static void llmcbi_random_seed(llmcbi_random *r)
{
    int fd = LLMCBI_SYS(open)("/dev/urandom", O_RDONLY | O_CLOEXEC);
    ssize_t n = -1;

    if (fd >= 0) {
        do n = LLMCBI_SYS(read)(fd, r->s, sizeof r->s);
        while (n < 0 && errno == EINTR);
        LLMCBI_SYS(close)(fd);
    }
    if (n != (ssize_t)sizeof r->s) {
        /* no such device: ids need to differ, not to be secret */
        struct timespec ts;
        LLMCBI_SYS(clock_gettime)(CLOCK_REALTIME, &ts);
        r->s[0] ^= (uint64_t)ts.tv_nsec * 0x9E3779B97F4A7C15u;
        r->s[1] ^= (uint64_t)ts.tv_sec;
        r->s[2] ^= (uint64_t)getpid() << 32;
        r->s[3] ^= (uint64_t)(uintptr_t)r | 1;
    }
}

static uint64_t llmcbi_random_next(llmcbi_random *r)
{
    uint64_t *s = r->s, x = s[1] * 5, t = s[1] << 17;

    x = (x << 7 | x >> 57) * 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = s[3] << 45 | s[3] >> 19;
    return x;
}

static void llmcbi_uuid(llmcbi_random *r, char out[37])
{
    static const char hex[] = "0123456789abcdef";
    uint64_t bits = 0;
    int i;

    for (i = 0; i < 36; i++) {
        if (i == 0 || i == 18) bits = llmcbi_random_next(r);
        if (i == 8 || i == 13 || i == 18 || i == 23) {
            out[i] = '-';
            continue;
        }
        out[i] = hex[bits & 15];
        if (i == 14) out[i] = '4';
        if (i == 19) out[i] = hex[8 | (bits & 3)];
        bits >>= 4;
    }
    out[36] = '\0';
}

static bool llmcbi_uuid_valid(const char *s)
{
    int i;

    for (i = 0; i < 36; i++) {
        char c = llmcbi_lower(s[i]);
        bool dash = i == 8 || i == 13 || i == 18 || i == 23;
        if (dash ? c != '-'
                 : !((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')))
            return false;
    }
    return s[36] == '\0';
}

/* What has come of a character while the rest is still to come. */
typedef struct llmcbi_carry {
    uint8_t n;        /* bytes of an incomplete UTF-8 sequence */
    uint8_t bytes[3];
    uint16_t high;    /* a high surrogate, or 0 */
} llmcbi_carry;

static char *llmcbi_put_replacement(char *out)
{
    memcpy(out, "\xEF\xBF\xBD", 3);
    return out + 3;
}

static char *llmcbi_put_utf8(char *out, uint32_t cp)
{
    if (cp < 0x80) {
        *out++ = (char)cp;
    } else if (cp < 0x800) {
        *out++ = (char)(0xC0 | cp >> 6);
        *out++ = (char)(0x80 | (cp & 63));
    } else if (cp < 0x10000) {
        *out++ = (char)(0xE0 | cp >> 12);
        *out++ = (char)(0x80 | (cp >> 6 & 63));
        *out++ = (char)(0x80 | (cp & 63));
    } else {
        *out++ = (char)(0xF0 | cp >> 18);
        *out++ = (char)(0x80 | (cp >> 12 & 63));
        *out++ = (char)(0x80 | (cp >> 6 & 63));
        *out++ = (char)(0x80 | (cp & 63));
    }
    return out;
}

/* U+FFFD for what can no longer be completed. */
static char *llmcbi_carry_flush(char *out, llmcbi_carry *c)
{
    if (c->n) out = llmcbi_put_replacement(out);
    if (c->high) out = llmcbi_put_replacement(out);
    memset(c, 0, sizeof *c);
    return out;
}

/* Bytes of the sequence that `first` opens; 0: none does. */
static int llmcbi_utf8_size(unsigned first)
{
    if (first < 0x80) return 1;
    if (first < 0xC2) return 0;
    if (first < 0xE0) return 2;
    if (first < 0xF0) return 3;
    return first < 0xF5 ? 4 : 0;
}

/* Whether b may stand at place n (1..3) behind `first`. */
static bool llmcbi_utf8_follows(unsigned first, int n, unsigned b)
{
    if (n == 1) {
        if (first == 0xE0) return b >= 0xA0 && b < 0xC0;
        if (first == 0xED) return b >= 0x80 && b < 0xA0;
        if (first == 0xF0) return b >= 0x90 && b < 0xC0;
        if (first == 0xF4) return b >= 0x80 && b < 0x90;
    }
    return b >= 0x80 && b < 0xC0;
}

/* One byte of UTF-8 into `out`, or into the carry, or replaced. Writes at
 * most 6 bytes more than it has taken. */
static char *llmcbi_put_byte(char *out, llmcbi_carry *c, unsigned char b)
{
    if (c->n) {
        if (llmcbi_utf8_follows(c->bytes[0], c->n, b)) {
            if (c->n + 1 == llmcbi_utf8_size(c->bytes[0])) {
                memcpy(out, c->bytes, c->n);
                out += c->n;
                *out++ = (char)b;
                c->n = 0;
            } else {
                c->bytes[c->n++] = b;
            }
            return out;
        }
        out = llmcbi_put_replacement(out);
        c->n = 0;
    }
    if (b < 0x80) {
        *out++ = (char)b;
    } else if (llmcbi_utf8_size(b)) {
        c->bytes[0] = b;
        c->n = 1;
    } else {
        out = llmcbi_put_replacement(out);
    }
    return out;
}

static bool llmcbi_utf8_valid(const char *s, size_t len)
{
    size_t i = 0;

    while (i < len) {
        unsigned char first = (unsigned char)s[i++];
        int k, size = llmcbi_utf8_size(first);
        if (!size) return false;
        for (k = 1; k < size; k++, i++)
            if (i == len ||
                !llmcbi_utf8_follows(first, k, (unsigned char)s[i]))
                return false;
    }
    return true;
}

/* ==== [JSON] pull reader over bytes in place, writer =================== */

typedef enum llmcbi_json_type {
    LLMCBI_JSON_ERROR,
    LLMCBI_JSON_END, /* the document is over */
    LLMCBI_JSON_OBJECT,
    LLMCBI_JSON_OBJECT_END,
    LLMCBI_JSON_ARRAY,
    LLMCBI_JSON_ARRAY_END,
    LLMCBI_JSON_KEY,
    LLMCBI_JSON_STRING,
    LLMCBI_JSON_NUMBER,
    LLMCBI_JSON_TRUE,
    LLMCBI_JSON_FALSE,
    LLMCBI_JSON_NULL
} llmcbi_json_type;

#define LLMCBI_JSON_DEPTH 128u

/* A strict RFC 8259 reader that goes forward once and allocates nothing.
 * One bit a level says whether it is an object, so depth costs no stack. */
typedef struct llmcbi_json {
    const char *p, *end;
    const char *str; /* the last key, string or number, as it stands */
    size_t len;
    uint32_t depth;
    uint32_t is_object[LLMCBI_JSON_DEPTH / 32];
    uint8_t expect;
    bool escaped;  /* str has escapes */
    bool high;     /* str has bytes above 0x7F */
    bool too_deep; /* why it failed */
} llmcbi_json;

enum {
    LLMCBI_EXPECT_VALUE,
    LLMCBI_EXPECT_FIRST, /* a value or the end of an array */
    LLMCBI_EXPECT_KEY_OR_END,
    LLMCBI_EXPECT_NEXT, /* a comma or the end of a container */
    LLMCBI_EXPECT_END
};

static void llmcbi_json_init(llmcbi_json *j, const char *ptr, size_t len)
{
    memset(j, 0, sizeof *j);
    j->p = ptr;
    j->end = ptr + len;
}

static llmcbi_json_type llmcbi_json_fail(llmcbi_json *j)
{
    j->p = j->end;
    j->expect = LLMCBI_EXPECT_VALUE; /* nothing valid can follow */
    return LLMCBI_JSON_ERROR;
}

static int llmcbi_hex(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    c = llmcbi_lower(c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The rest of a string behind its opening quote. */
static bool llmcbi_json_string(llmcbi_json *j)
{
    const char *p = j->p, *end = j->end;

    j->str = p;
    j->escaped = j->high = false;
    for (;;) {
        unsigned char c;
        /* eight plain ASCII bytes at a time: no quote, no backslash, none
         * below 0x20 or above 0x7F */
        while (end - p >= 8) {
            uint64_t w, q, b;
            const uint64_t ones = 0x0101010101010101u, tops = ones << 7;
            memcpy(&w, p, 8);
            q = w ^ ones * '"';
            b = w ^ ones * '\\';
            if (((w - ones * 0x20) | (q - ones) | (b - ones) | w) & tops)
                break;
            p += 8;
        }
        if (p == end) return false;
        c = (unsigned char)*p++;
        if (c == '"') break;
        if (c < 0x20) return false;
        if (c >= 0x80) j->high = true;
        if (c != '\\') continue;
        j->escaped = true;
        if (p == end) return false;
        c = (unsigned char)*p++;
        if (c == 'u') {
            int i;
            if (end - p < 4) return false;
            for (i = 0; i < 4; i++)
                if (llmcbi_hex(*p++) < 0) return false;
        } else if (!memchr("\"\\/bfnrt", c, 8)) {
            return false;
        }
    }
    j->len = (size_t)(p - 1 - j->str);
    j->p = p;
    return true;
}

static const char *llmcbi_digits(const char *p, const char *end)
{
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p;
}

static bool llmcbi_json_number(llmcbi_json *j)
{
    const char *p = j->p, *end = j->end, *digits;

    j->str = p;
    if (p < end && *p == '-') p++;
    digits = p;
    p = llmcbi_digits(p, end);
    if (p == digits || (*digits == '0' && p - digits > 1)) return false;
    if (p < end && *p == '.') {
        digits = ++p;
        p = llmcbi_digits(p, end);
        if (p == digits) return false;
    }
    if (p < end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < end && (*p == '+' || *p == '-')) p++;
        digits = p;
        p = llmcbi_digits(p, end);
        if (p == digits) return false;
    }
    j->len = (size_t)(p - j->str);
    j->p = p;
    return true;
}

static bool llmcbi_json_word(llmcbi_json *j, const char *word, size_t len)
{
    if ((size_t)(j->end - j->p) < len || memcmp(j->p, word, len) != 0)
        return false;
    j->p += len;
    return true;
}

static llmcbi_json_type llmcbi_json_open(llmcbi_json *j, bool object)
{
    uint32_t bit = 1u << (j->depth % 32), *word;

    if (j->depth == LLMCBI_JSON_DEPTH) {
        j->too_deep = true;
        return llmcbi_json_fail(j);
    }
    word = &j->is_object[j->depth++ / 32];
    *word = object ? *word | bit : *word & ~bit;
    j->expect = object ? LLMCBI_EXPECT_KEY_OR_END : LLMCBI_EXPECT_FIRST;
    return object ? LLMCBI_JSON_OBJECT : LLMCBI_JSON_ARRAY;
}

static bool llmcbi_json_in_object(const llmcbi_json *j)
{
    uint32_t d = j->depth - 1;

    return (j->is_object[d / 32] >> (d % 32) & 1) != 0;
}

static llmcbi_json_type llmcbi_json_close(llmcbi_json *j, bool object)
{
    j->depth--;
    j->expect = j->depth ? LLMCBI_EXPECT_NEXT : LLMCBI_EXPECT_END;
    return object ? LLMCBI_JSON_OBJECT_END : LLMCBI_JSON_ARRAY_END;
}

static void llmcbi_json_space(llmcbi_json *j)
{
    while (j->p < j->end &&
           (*j->p == ' ' || *j->p == '\n' || *j->p == '\t' || *j->p == '\r'))
        j->p++;
}

static llmcbi_json_type llmcbi_json_value(llmcbi_json *j)
{
    llmcbi_json_type type = LLMCBI_JSON_ERROR;
    bool ok;

    switch (*j->p) {
    case '{':
        j->p++;
        return llmcbi_json_open(j, true);
    case '[':
        j->p++;
        return llmcbi_json_open(j, false);
    case '"':
        j->p++;
        type = LLMCBI_JSON_STRING;
        ok = llmcbi_json_string(j);
        break;
    case 't':
        type = LLMCBI_JSON_TRUE;
        ok = llmcbi_json_word(j, "true", 4);
        break;
    case 'f':
        type = LLMCBI_JSON_FALSE;
        ok = llmcbi_json_word(j, "false", 5);
        break;
    case 'n':
        type = LLMCBI_JSON_NULL;
        ok = llmcbi_json_word(j, "null", 4);
        break;
    default:
        type = LLMCBI_JSON_NUMBER;
        ok = llmcbi_json_number(j);
        break;
    }
    if (!ok) return llmcbi_json_fail(j);
    j->expect = j->depth ? LLMCBI_EXPECT_NEXT : LLMCBI_EXPECT_END;
    return type;
}

static llmcbi_json_type llmcbi_json_key(llmcbi_json *j)
{
    if (*j->p != '"') return llmcbi_json_fail(j);
    j->p++;
    if (!llmcbi_json_string(j)) return llmcbi_json_fail(j);
    llmcbi_json_space(j);
    if (j->p == j->end || *j->p != ':') return llmcbi_json_fail(j);
    j->p++;
    j->expect = LLMCBI_EXPECT_VALUE;
    return LLMCBI_JSON_KEY;
}

/* The next token. After LLMCBI_JSON_ERROR it returns that for ever. */
static llmcbi_json_type llmcbi_json_next(llmcbi_json *j)
{
    llmcbi_json_space(j);
    if (j->p == j->end)
        return j->expect == LLMCBI_EXPECT_END ? LLMCBI_JSON_END
                                              : llmcbi_json_fail(j);
    switch (j->expect) {
    case LLMCBI_EXPECT_FIRST:
        if (*j->p == ']') {
            j->p++;
            return llmcbi_json_close(j, false);
        }
        return llmcbi_json_value(j);
    case LLMCBI_EXPECT_VALUE:
        return llmcbi_json_value(j);
    case LLMCBI_EXPECT_KEY_OR_END:
        if (*j->p == '}') {
            j->p++;
            return llmcbi_json_close(j, true);
        }
        return llmcbi_json_key(j);
    case LLMCBI_EXPECT_NEXT: {
        bool object = llmcbi_json_in_object(j);
        char c = *j->p++;
        if (c == (object ? '}' : ']')) return llmcbi_json_close(j, object);
        if (c != ',') return llmcbi_json_fail(j);
        llmcbi_json_space(j);
        if (j->p == j->end) return llmcbi_json_fail(j);
        return object ? llmcbi_json_key(j) : llmcbi_json_value(j);
    }
    default: /* something behind the document */
        return llmcbi_json_fail(j);
    }
}

/* Passes over what is left of the value that `type` began. */
static void llmcbi_json_skip(llmcbi_json *j, llmcbi_json_type type)
{
    uint32_t depth = j->depth;

    if (type != LLMCBI_JSON_OBJECT && type != LLMCBI_JSON_ARRAY) return;
    while (j->depth >= depth)
        if (llmcbi_json_next(j) == LLMCBI_JSON_ERROR) return;
}

/* Passes over the next value; its text is then in str and len. */
static llmcbi_json_type llmcbi_json_raw(llmcbi_json *j)
{
    llmcbi_json_type type;
    const char *start;

    llmcbi_json_space(j);
    start = j->p;
    type = llmcbi_json_next(j);
    llmcbi_json_skip(j, type);
    if (j->p == j->end && j->expect != LLMCBI_EXPECT_END)
        return LLMCBI_JSON_ERROR;
    j->str = start;
    j->len = (size_t)(j->p - start);
    return type;
}

/* Whether the rest holds nothing but white space: the document is whole. */
static bool llmcbi_json_whole(llmcbi_json *j)
{
    return llmcbi_json_next(j) == LLMCBI_JSON_END;
}

/* Decodes the inside of a JSON string to UTF-8. Writes at most
 * 3 * len + 6 bytes and returns how many. What is incomplete at the end
 * stays in the carry. */
static size_t llmcbi_json_decode(char *out, const char *s, size_t len,
                                 llmcbi_carry *c)
{
    const char *end = s + len;
    char *o = out;

    while (s < end) {
        unsigned char b = (unsigned char)*s++;
        uint32_t cp;
        if (b != '\\') {
            if (c->high) o = llmcbi_carry_flush(o, c);
            o = llmcbi_put_byte(o, c, b);
            continue;
        }
        b = (unsigned char)*s++;
        switch (b) {
        case 'b': cp = '\b'; break;
        case 'f': cp = '\f'; break;
        case 'n': cp = '\n'; break;
        case 'r': cp = '\r'; break;
        case 't': cp = '\t'; break;
        case 'u':
            cp = (uint32_t)(llmcbi_hex(s[0]) << 12 | llmcbi_hex(s[1]) << 8 |
                            llmcbi_hex(s[2]) << 4 | llmcbi_hex(s[3]));
            s += 4;
            break;
        default: cp = b; break;
        }
        if (c->high && cp >= 0xDC00 && cp < 0xE000) {
            cp = 0x10000 + ((uint32_t)(c->high - 0xD800) << 10) +
                 (cp - 0xDC00);
            c->high = 0;
        }
        o = llmcbi_carry_flush(o, c);
        if (cp >= 0xD800 && cp < 0xDC00)
            c->high = (uint16_t)cp;
        else if (cp >= 0xDC00 && cp < 0xE000)
            o = llmcbi_put_replacement(o);
        else
            o = llmcbi_put_utf8(o, cp);
    }
    return (size_t)(o - out);
}

/* Whether the last key or string is `text`. */
static bool llmcbi_json_is(const llmcbi_json *j, const char *text)
{
    char plain[3 * 40 + 6];
    llmcbi_carry c;
    size_t n;

    if (!j->escaped) return llmcbi_str_is(llmcbi_slice(j->str, j->len), text);
    if (j->len > 40) return false;
    memset(&c, 0, sizeof c);
    n = llmcbi_json_decode(plain, j->str, j->len, &c);
    return !c.n && !c.high && llmcbi_str_is(llmcbi_slice(plain, n), text);
}

/* The last number, if it is a whole one that fits. */
static bool llmcbi_json_int(const llmcbi_json *j, int64_t *out)
{
    const char *p = j->str, *end = p + j->len;
    bool negative = p < end && *p == '-';
    int64_t v = 0;

    for (p += negative; p < end; p++) {
        if (*p < '0' || *p > '9' || v > (INT64_MAX - 9) / 10) return false;
        v = v * 10 + (*p - '0');
    }
    *out = negative ? -v : v;
    return true;
}

/* Appends a whole string value, decoded. */
static void llmcbi_json_text(const llmcb_allocator *a, llmcbi_buf *b,
                             const llmcbi_json *j)
{
    llmcbi_carry c;

    memset(&c, 0, sizeof c);
    if (j->len > SIZE_MAX / 8 ||
        !llmcbi_buf_reserve(a, b, 3 * j->len + 12))
        return;
    b->len += llmcbi_json_decode(b->ptr + b->len, j->str, j->len, &c);
    b->len = (size_t)(llmcbi_carry_flush(b->ptr + b->len, &c) - b->ptr);
    b->ptr[b->len] = '\0';
}

/* The same into a small array, cut and cleaned for people. */
static void llmcbi_json_clean(char *out, size_t cap, const llmcbi_json *j)
{
    char plain[3 * 256 + 12];
    size_t n, len = j->len < 256 ? j->len : 256;
    llmcbi_carry c;

    /* not in the middle of an escape: its digits would be read beyond */
    if (len < j->len) {
        const char *b;
        while (len > 250 && (b = (const char *)memchr(j->str + len - 6, '\\',
                                                      6)) != NULL)
            len = (size_t)(b - j->str);
    }
    memset(&c, 0, sizeof c);
    n = llmcbi_json_decode(plain, j->str, len, &c);
    llmcbi_copy_clean(out, cap, plain, n);
}

/* A JSON string with its quotes. Bytes must be UTF-8. */
static void llmcbi_json_quote(const llmcb_allocator *a, llmcbi_buf *b,
                              const char *s, size_t len)
{
    static const char hex[] = "0123456789abcdef";
    size_t i, plain = 0;

    llmcbi_buf_add(a, b, "\"", 1);
    for (i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        char esc[6] = { '\\', 'u', '0', '0', 0, 0 };
        const char *two;
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7F) continue;
        llmcbi_buf_add(a, b, s + plain, i - plain);
        plain = i + 1;
        two = c ? (const char *)memchr("\"\\\n\r\t\b\f", c, 7) : NULL;
        if (two) {
            esc[1] = "\"\\nrtbf"[two - (const char *)memchr(
                                           "\"\\\n\r\t\b\f", '"', 7)];
            llmcbi_buf_add(a, b, esc, 2);
        } else {
            esc[4] = hex[c >> 4];
            esc[5] = hex[c & 15];
            llmcbi_buf_add(a, b, esc, 6);
        }
    }
    llmcbi_buf_add(a, b, s + plain, len - plain);
    llmcbi_buf_add(a, b, "\"", 1);
}

/* ==== [SSE] event-stream framer ======================================== */

/* HTML's event stream: LF, CR and CRLF end a line, a blank line ends an
 * event. An event of one data line that lies whole in the input is handed
 * out in place; else its bytes are gathered in the two buffers. */
typedef struct llmcbi_sse {
    llmcbi_buf line; /* a line that began in earlier input */
    llmcbi_buf data; /* data lines so far, joined by LF */
    size_t limit;
    llmcb_str here;  /* the only data line so far, in the present input */
    uint8_t bom;     /* bytes of a byte order mark seen; 3: no longer */
    bool skip_lf;    /* the last line ended in CR */
    bool in_data;    /* `data` holds the lines so far */
    bool is_error;   /* "event: error" */
} llmcbi_sse;

typedef enum llmcbi_sse_status {
    LLMCBI_SSE_MORE, /* the input is used up */
    LLMCBI_SSE_EVENT,
    LLMCBI_SSE_LIMIT,
    LLMCBI_SSE_NOMEM
} llmcbi_sse_status;

static void llmcbi_sse_free(const llmcb_allocator *a, llmcbi_sse *s)
{
    llmcbi_buf_free(a, &s->line);
    llmcbi_buf_free(a, &s->data);
}

/* Puts what would be lost with the input into the buffer. */
static bool llmcbi_sse_gather(const llmcb_allocator *a, llmcbi_sse *s)
{
    if (s->here.ptr && !s->in_data) {
        s->data.len = 0;
        llmcbi_buf_add(a, &s->data, s->here.ptr, s->here.len);
        s->in_data = true;
    }
    s->here.ptr = NULL;
    return !s->data.failed;
}

static llmcbi_sse_status llmcbi_sse_data(const llmcb_allocator *a,
                                         llmcbi_sse *s, llmcb_str value)
{
    if (!s->here.ptr && !s->in_data) {
        s->here = value;
        return LLMCBI_SSE_MORE;
    }
    if (!llmcbi_sse_gather(a, s)) return LLMCBI_SSE_NOMEM;
    if (s->data.len + 1 + value.len > s->limit) return LLMCBI_SSE_LIMIT;
    llmcbi_buf_add(a, &s->data, "\n", 1);
    llmcbi_buf_add(a, &s->data, value.ptr, value.len);
    return s->data.failed ? LLMCBI_SSE_NOMEM : LLMCBI_SSE_MORE;
}

/* One line without its end. LLMCBI_SSE_EVENT: *event is complete. */
static llmcbi_sse_status llmcbi_sse_line(const llmcb_allocator *a,
                                         llmcbi_sse *s, llmcb_str line,
                                         llmcb_str *event)
{
    size_t name;
    llmcb_str value;

    if (line.len == 0) {
        *event = s->in_data ? llmcbi_buf_str(&s->data) : s->here;
        s->here.ptr = NULL;
        s->in_data = false;
        if (event->ptr && event->len) return LLMCBI_SSE_EVENT;
        s->is_error = false;
        return LLMCBI_SSE_MORE;
    }
    /* data: is nearly all there is */
    if (line.len >= 5 && memcmp(line.ptr, "data:", 5) == 0) {
        name = 4;
    } else {
        const char *colon = (const char *)memchr(line.ptr, ':', line.len);
        name = colon ? (size_t)(colon - line.ptr) : line.len;
    }
    value = llmcbi_slice(line.ptr + name, line.len - name);
    if (value.len) { /* the colon and at most one blank */
        size_t skip = value.len > 1 && value.ptr[1] == ' ' ? 2 : 1;
        value.ptr += skip;
        value.len -= skip;
    }
    line.len = name;
    if (llmcbi_str_is(line, "data")) return llmcbi_sse_data(a, s, value);
    if (llmcbi_str_is(line, "event"))
        s->is_error = llmcbi_str_is(value, "error");
    return LLMCBI_SSE_MORE;
}

/* The first end of a line in the input, or NULL. */
static const char *llmcbi_sse_eol(const char *p, const char *end)
{
    const char *lf = (const char *)memchr(p, '\n', (size_t)(end - p));
    const char *cr =
        (const char *)memchr(p, '\r', (size_t)((lf ? lf : end) - p));

    return cr ? cr : lf;
}

static bool llmcbi_sse_bom(const llmcb_allocator *a, llmcbi_sse *s,
                           const char **p, const char *end)
{
    static const char bom[] = "\xEF\xBB\xBF";

    while (s->bom < 3 && *p < end) {
        if (**p != bom[s->bom]) {
            llmcbi_buf_add(a, &s->line, bom, s->bom);
            s->bom = 3;
            break;
        }
        (*p)++;
        s->bom++;
    }
    return !s->line.failed;
}

/* Takes input from *p on. An event is valid until the next call, and as
 * long as the input. s->is_error belongs to it. */
static llmcbi_sse_status llmcbi_sse_next(const llmcb_allocator *a,
                                         llmcbi_sse *s, const char **p,
                                         const char *end, llmcb_str *event)
{
    if (s->bom < 3 && !llmcbi_sse_bom(a, s, p, end)) return LLMCBI_SSE_NOMEM;
    while (*p < end) {
        const char *eol;
        llmcb_str line;
        llmcbi_sse_status status;
        bool split = s->line.len > 0;

        if (s->skip_lf) {
            s->skip_lf = false;
            if (**p == '\n') {
                (*p)++;
                continue;
            }
        }
        eol = llmcbi_sse_eol(*p, end);
        line = llmcbi_slice(*p, (size_t)((eol ? eol : end) - *p));
        if (s->line.len + line.len > s->limit) return LLMCBI_SSE_LIMIT;
        if (split || !eol) {
            llmcbi_buf_add(a, &s->line, line.ptr, line.len);
            if (s->line.failed) return LLMCBI_SSE_NOMEM;
            line = llmcbi_buf_str(&s->line);
        }
        *p = eol ? eol + 1 : end;
        if (!eol) break;
        s->skip_lf = *eol == '\r';
        if (line.len && !s->here.ptr && !s->in_data && split) {
            /* a data line in `line` does not stay there */
            status = llmcbi_sse_line(a, s, line, event);
            if (!llmcbi_sse_gather(a, s)) return LLMCBI_SSE_NOMEM;
        } else {
            status = llmcbi_sse_line(a, s, line, event);
        }
        s->line.len = 0;
        if (status == LLMCBI_SSE_EVENT) return status;
        if (status != LLMCBI_SSE_MORE) return status;
    }
    return llmcbi_sse_gather(a, s) ? LLMCBI_SSE_MORE : LLMCBI_SSE_NOMEM;
}

/* ==== [LOOP] poll set, timers, wake-up, posts, embedding =============== */

/* Something that the loop is to do in this turn. Zeroed: not queued. */
typedef struct llmcbi_ready {
    struct llmcbi_ready *prev, *next;
    void (*fn)(struct llmcbi_ready *r);
} llmcbi_ready;

/* Room in the heap is reserved when the timer is made: arming cannot fail. */
typedef struct llmcbi_timer {
    void (*fn)(struct llmcbi_timer *t);
    int64_t due;
    uint64_t seq; /* equal times expire in the order of arming */
    size_t place; /* in the heap, from 1; 0: not armed */
} llmcbi_timer;

typedef struct llmcbi_watch {
    void (*fn)(struct llmcbi_watch *w, int events);
    int fd;
    int events;
    size_t place; /* in the loop's array, from 1; 0: not watched */
} llmcbi_watch;

typedef struct llmcbi_post {
    struct llmcbi_post *next;
    void (*fn)(void *arg);
    void *arg;
} llmcbi_post;

typedef struct llmcbi_fired {
    llmcbi_watch *watch;
    int events;
} llmcbi_fired;

#define LLMCBI_SCRATCH ((size_t)64 * 1024) /* of one read */
#define LLMCBI_MAX_FIRED 128 /* descriptors served in one turn */
#define LLMCBI_ROUNDS 8      /* of the ready list in one turn */

typedef struct llmcbi_pool llmcbi_pool;
typedef struct llmcbi_cursor llmcbi_cursor;
typedef struct llmcbi_block llmcbi_block;

struct llmcb_loop {
    llmcb_allocator alloc;
    void (*log)(void *user, const char *line);
    void *log_user;
    llmcb_host host;
    int64_t host_timer; /* what the host was told; -2: nothing yet */
    int64_t shutdown_ms;
    int64_t now;
    llmcbi_random random;
    unsigned workers;
    size_t worker_stack;
    pid_t pid;
    pthread_t thread;
    bool thread_known;
    bool virtual_clock;
    bool turning; /* inside a turn: user code may be on the stack */
    bool stopping;
    bool freeing; /* awaits end at once, nothing new starts */

    llmcbi_ready ready, round; /* list heads */
    llmcbi_timer **heap;       /* from 1 */
    size_t n_timers, heap_cap, timers_made;
    uint64_t timer_seq;
    llmcbi_watch **watches;
    size_t n_watches, watches_cap;
    size_t poll_start;
    struct pollfd *fds; /* poll(2) alone */
    size_t fds_cap;
    int epoll_fd;
    llmcbi_fired fired[LLMCBI_MAX_FIRED];
    size_t n_fired;
    int wake_fd[2];
    llmcbi_flag cancels; /* some op has cancel_wanted */
    llmcb_op *ops;       /* all, done or not */
    size_t n_alive;      /* operations that are not done */
    llmcb_transport *transports, *default_transport;
    uint64_t last_identity;
    void *scratch; /* shared read buffer of the socket transport */
    llmcbi_cursor *unpublished; /* whose news the pool must be told */
    llmcbi_block *spare;        /* blocks of logs, for use again */
    size_t n_spare;

    /* Shared with other threads, under the mutex. */
    pthread_mutex_t mutex;
    bool sleeping;      /* the loop waits, or its host does */
    llmcbi_post *posts, **last_post;
    llmcbi_pool *pool;  /* set once, by the loop */
    llmcbi_cursor *progress; /* cursors that workers have moved */
    bool progress_due;       /* one of them has reached its mark */
};

static void llmcbi_log(llmcb_loop *loop, const char *line)
{
    if (loop->log) loop->log(loop->log_user, line);
}

static void llmcbi_lock(llmcb_loop *loop)
{
    pthread_mutex_lock(&loop->mutex);
}

static void llmcbi_unlock(llmcb_loop *loop)
{
    pthread_mutex_unlock(&loop->mutex);
}

/* Every public function that works on the loop begins here. */
static llmcb_code llmcbi_enter(llmcb_loop *loop)
{
    if (!loop) return LLMCB_ENOMEM;
    if (loop->pid != getpid()) return LLMCB_EFORK;
    if (!loop->thread_known) {
        loop->thread = pthread_self();
        loop->thread_known = true;
    }
    return pthread_equal(loop->thread, pthread_self()) ? LLMCB_OK
                                                       : LLMCB_ESTATE;
}

/* -- ready list */

static void llmcbi_list_init(llmcbi_ready *head)
{
    head->prev = head->next = head;
}

static void llmcbi_unready(llmcbi_ready *r)
{
    if (!r->next) return;
    r->prev->next = r->next;
    r->next->prev = r->prev;
    r->prev = r->next = NULL;
}

static void llmcbi_host_update(llmcb_loop *loop);

static void llmcbi_make_ready(llmcb_loop *loop, llmcbi_ready *r)
{
    if (r->next) return;
    r->prev = loop->ready.prev;
    r->next = &loop->ready;
    r->prev->next = r;
    loop->ready.prev = r;
    if (loop->host.timer && !loop->turning) llmcbi_host_update(loop);
}

static bool llmcbi_list_empty(const llmcbi_ready *head)
{
    return head->next == head;
}

static void llmcbi_run_ready(llmcb_loop *loop)
{
    int i;

    for (i = 0; i < LLMCBI_ROUNDS && !llmcbi_list_empty(&loop->ready); i++) {
        /* what becomes ready meanwhile belongs to the next round */
        loop->round = loop->ready;
        loop->round.next->prev = loop->round.prev->next = &loop->round;
        llmcbi_list_init(&loop->ready);
        while (!llmcbi_list_empty(&loop->round)) {
            llmcbi_ready *r = loop->round.next;
            llmcbi_unready(r);
            r->fn(r);
        }
    }
}

/* -- timers: a binary heap */

static bool llmcbi_timer_before(const llmcbi_timer *a, const llmcbi_timer *b)
{
    return a->due != b->due ? a->due < b->due : a->seq < b->seq;
}

static void llmcbi_heap_put(llmcb_loop *loop, size_t place, llmcbi_timer *t)
{
    loop->heap[place] = t;
    t->place = place;
}

static void llmcbi_heap_up(llmcb_loop *loop, size_t i, llmcbi_timer *t)
{
    for (; i > 1 && llmcbi_timer_before(t, loop->heap[i / 2]); i /= 2)
        llmcbi_heap_put(loop, i, loop->heap[i / 2]);
    llmcbi_heap_put(loop, i, t);
}

static void llmcbi_heap_down(llmcb_loop *loop, size_t i, llmcbi_timer *t)
{
    size_t child;

    while ((child = 2 * i) <= loop->n_timers) {
        if (child < loop->n_timers &&
            llmcbi_timer_before(loop->heap[child + 1], loop->heap[child]))
            child++;
        if (!llmcbi_timer_before(loop->heap[child], t)) break;
        llmcbi_heap_put(loop, i, loop->heap[child]);
        i = child;
    }
    llmcbi_heap_put(loop, i, t);
}

static bool llmcbi_timer_init(llmcb_loop *loop, llmcbi_timer *t,
                              void (*fn)(llmcbi_timer *))
{
    if (loop->timers_made + 1 >= loop->heap_cap) {
        size_t cap = loop->heap_cap ? 2 * loop->heap_cap : 16;
        llmcbi_timer **heap = (llmcbi_timer **)llmcbi_resize(
            &loop->alloc, loop->heap, loop->heap_cap * sizeof *heap,
            cap * sizeof *heap);
        if (!heap) return false;
        loop->heap = heap;
        loop->heap_cap = cap;
    }
    loop->timers_made++;
    memset(t, 0, sizeof *t);
    t->fn = fn;
    return true;
}

static void llmcbi_timer_stop(llmcb_loop *loop, llmcbi_timer *t)
{
    size_t i = t->place;
    llmcbi_timer *last;

    if (!i) return;
    t->place = 0;
    last = loop->heap[loop->n_timers--];
    if (last == t) return;
    if (i > 1 && llmcbi_timer_before(last, loop->heap[i / 2]))
        llmcbi_heap_up(loop, i, last);
    else
        llmcbi_heap_down(loop, i, last);
}

/* fn once, ms from now; at the earliest in the next turn. */
static void llmcbi_timer_start(llmcb_loop *loop, llmcbi_timer *t, int64_t ms)
{
    if (ms < 0) ms = 0;
    if (ms > INT64_MAX / 2) ms = INT64_MAX / 2;
    llmcbi_timer_stop(loop, t);
    if (!loop->virtual_clock && !loop->turning) loop->now = llmcbi_clock_ms();
    /* the clock is cut to whole milliseconds: never too early */
    t->due = loop->now + ms + (loop->virtual_clock || ms == 0 ? 0 : 1);
    t->seq = ++loop->timer_seq;
    llmcbi_heap_up(loop, ++loop->n_timers, t);
    if (loop->host.timer && !loop->turning) llmcbi_host_update(loop);
}

/* A timer from llmcbi_timer_init that is needed no more. */
static void llmcbi_timer_free(llmcb_loop *loop, llmcbi_timer *t)
{
    if (!t->fn) return;
    llmcbi_timer_stop(loop, t);
    t->fn = NULL;
    loop->timers_made--;
}

static void llmcbi_run_timers(llmcb_loop *loop)
{
    uint64_t last = loop->timer_seq; /* what is armed here waits a turn */

    while (loop->n_timers && loop->heap[1]->due <= loop->now &&
           loop->heap[1]->seq <= last) {
        llmcbi_timer *t = loop->heap[1];
        llmcbi_timer_stop(loop, t);
        t->fn(t);
    }
}

/* -- descriptors: four functions, by poll(2) or epoll */

static bool llmcbi_cloexec_nonblock(int fd)
{
    int flags = LLMCBI_SYS(fcntl)(fd, F_GETFL);

    return flags >= 0 &&
           LLMCBI_SYS(fcntl)(fd, F_SETFL, flags | O_NONBLOCK) == 0 &&
           LLMCBI_SYS(fcntl)(fd, F_SETFD, FD_CLOEXEC) == 0;
}

#if LLMCBI_EPOLL
static bool llmcbi_poller_ctl(llmcb_loop *loop, int op, int fd, int events,
                              void *ptr)
{
    struct epoll_event ev;

    memset(&ev, 0, sizeof ev);
    if (events & LLMCB_READ) ev.events |= EPOLLIN;
    if (events & LLMCB_WRITE) ev.events |= EPOLLOUT;
    ev.data.ptr = ptr;
    return LLMCBI_SYS(epoll_ctl)(loop->epoll_fd, op, fd, &ev) == 0;
}

static bool llmcbi_poller_open(llmcb_loop *loop)
{
    loop->epoll_fd = LLMCBI_SYS(epoll_create1)(EPOLL_CLOEXEC);
    return loop->epoll_fd >= 0 &&
           llmcbi_poller_ctl(loop, EPOLL_CTL_ADD, loop->wake_fd[0],
                             LLMCB_READ, NULL);
}

static void llmcbi_poller_close(llmcb_loop *loop)
{
    if (loop->epoll_fd >= 0) LLMCBI_SYS(close)(loop->epoll_fd);
}

static bool llmcbi_poller_set(llmcb_loop *loop, llmcbi_watch *w, int before)
{
    int op = !before      ? EPOLL_CTL_ADD
             : !w->events ? EPOLL_CTL_DEL
                          : EPOLL_CTL_MOD;

    return llmcbi_poller_ctl(loop, op, w->fd, w->events, w) || !w->events;
}

static bool llmcbi_poller_wait(llmcb_loop *loop, int timeout)
{
    struct epoll_event ev[LLMCBI_MAX_FIRED];
    int i, n = LLMCBI_SYS(epoll_wait)(loop->epoll_fd, ev, LLMCBI_MAX_FIRED,
                                      timeout);
    bool woken = false;

    loop->n_fired = 0;
    for (i = 0; i < n; i++) {
        llmcbi_fired *f = &loop->fired[loop->n_fired];
        if (!ev[i].data.ptr) {
            woken = true;
            continue;
        }
        f->watch = (llmcbi_watch *)ev[i].data.ptr;
        f->events = 0;
        if (ev[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
            f->events |= LLMCB_READ;
        if (ev[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
            f->events |= LLMCB_WRITE;
        loop->n_fired++;
    }
    return woken;
}
#else
static bool llmcbi_poller_open(llmcb_loop *loop)
{
    loop->epoll_fd = -1;
    return true;
}

static void llmcbi_poller_close(llmcb_loop *loop)
{
    llmcbi_free(&loop->alloc, loop->fds, loop->fds_cap * sizeof *loop->fds);
}

static bool llmcbi_poller_set(llmcb_loop *loop, llmcbi_watch *w, int before)
{
    (void)before;
    if (loop->watches_cap >= loop->fds_cap) {
        size_t cap = loop->watches_cap + 1;
        struct pollfd *fds = (struct pollfd *)llmcbi_resize(
            &loop->alloc, loop->fds, loop->fds_cap * sizeof *fds,
            cap * sizeof *fds);
        if (!fds) return !w->events;
        loop->fds = fds;
        loop->fds_cap = cap;
    }
    if (loop->host.watch) loop->host.watch(loop->host.user, w->fd, w->events);
    return true;
}

static void llmcbi_poller_fire(llmcb_loop *loop, llmcbi_watch *w,
                               short revents)
{
    llmcbi_fired *f = &loop->fired[loop->n_fired];

    if (loop->n_fired == LLMCBI_MAX_FIRED) return;
    f->watch = w;
    f->events = 0;
    if (revents & (POLLIN | POLLERR | POLLHUP | POLLNVAL))
        f->events |= LLMCB_READ;
    if (revents & (POLLOUT | POLLERR | POLLHUP | POLLNVAL))
        f->events |= LLMCB_WRITE;
    if (f->events) loop->n_fired++;
}

/* The set, from a starting point that moves so that none is starved. */
static size_t llmcbi_poller_fill(llmcb_loop *loop, struct pollfd *fds,
                                 size_t cap)
{
    size_t i, n = loop->n_watches;

    if (n && ++loop->poll_start >= n) loop->poll_start = 0;
    for (i = 0; i < n + 1 && i < cap; i++) {
        fds[i].fd = loop->wake_fd[0];
        fds[i].events = POLLIN;
        fds[i].revents = 0;
        if (i) {
            llmcbi_watch *w = loop->watches[(loop->poll_start + i - 1) % n];
            fds[i].fd = w->fd;
            fds[i].events =
                (short)((w->events & LLMCB_READ ? POLLIN : 0) |
                        (w->events & LLMCB_WRITE ? POLLOUT : 0));
        }
    }
    return n + 1;
}

static llmcbi_watch *llmcbi_poller_find(llmcb_loop *loop, size_t hint, int fd)
{
    size_t i, n = loop->n_watches;

    for (i = 0; i < n; i++) {
        llmcbi_watch *w = loop->watches[(loop->poll_start + hint + i) % n];
        if (w->fd == fd) return w;
    }
    return NULL;
}

static bool llmcbi_poller_take(llmcb_loop *loop, const struct pollfd *fds,
                               size_t n)
{
    size_t i;
    bool woken = false;

    loop->n_fired = 0;
    for (i = 0; i < n; i++) {
        llmcbi_watch *w;
        if (!fds[i].revents) continue;
        if (fds[i].fd == loop->wake_fd[0])
            woken = true;
        else if ((w = llmcbi_poller_find(loop, i ? i - 1 : 0, fds[i].fd)))
            llmcbi_poller_fire(loop, w, fds[i].revents);
    }
    return woken;
}

static bool llmcbi_poller_wait(llmcb_loop *loop, int timeout)
{
    struct pollfd one, *fds = loop->fds ? loop->fds : &one;
    size_t n = llmcbi_poller_fill(loop, fds, loop->fds ? loop->fds_cap : 1);
    int got = LLMCBI_SYS(poll)(fds, (nfds_t)n, timeout);

    loop->n_fired = 0;
    return got > 0 && llmcbi_poller_take(loop, fds, n);
}
#endif

static llmcb_code llmcbi_watch_add(llmcb_loop *loop, llmcbi_watch *w, int fd)
{
    if (loop->n_watches == loop->watches_cap) {
        size_t cap = loop->watches_cap ? 2 * loop->watches_cap : 8;
        llmcbi_watch **list = (llmcbi_watch **)llmcbi_resize(
            &loop->alloc, loop->watches, loop->watches_cap * sizeof *list,
            cap * sizeof *list);
        if (!list) return LLMCB_ENOMEM;
        loop->watches = list;
        loop->watches_cap = cap;
    }
    w->fd = fd;
    loop->watches[loop->n_watches] = w;
    w->place = ++loop->n_watches;
    return LLMCB_OK;
}

static void llmcbi_watch_remove(llmcb_loop *loop, llmcbi_watch *w)
{
    size_t i;

    loop->watches[w->place - 1] = loop->watches[--loop->n_watches];
    loop->watches[w->place - 1]->place = w->place;
    w->place = 0;
    for (i = 0; i < loop->n_fired; i++)
        if (loop->fired[i].watch == w) loop->fired[i].watch = NULL;
}

/* Watches fd for events; 0 ends it. Must be told before fd is closed. */
static llmcb_code llmcbi_watch_set(llmcb_loop *loop, llmcbi_watch *w, int fd,
                                   int events)
{
    int before = w->place ? w->events : 0;
    bool ok;

    if (events == before) return LLMCB_OK;
    if (!before && llmcbi_watch_add(loop, w, fd) != LLMCB_OK)
        return LLMCB_ENOMEM;
    w->events = events;
    ok = llmcbi_poller_set(loop, w, before);
    if (!ok) w->events = before;
    if (!w->events) llmcbi_watch_remove(loop, w);
    return ok ? LLMCB_OK : LLMCB_ESYS;
}

static void llmcbi_run_fired(llmcb_loop *loop)
{
    size_t i;

    for (i = 0; i < loop->n_fired; i++) {
        llmcbi_fired f = loop->fired[i];
        loop->fired[i].watch = NULL;
        if (f.watch && (f.events &= f.watch->events) != 0)
            f.watch->fn(f.watch, f.events);
    }
    loop->n_fired = 0;
}

/* -- wake-up and posts */

LLMCBI_DEF void llmcb_loop_wakeup(llmcb_loop *loop)
{
    int saved = errno;
    ssize_t n;

    if (!loop) return;
    do n = LLMCBI_SYS(write)(loop->wake_fd[1], "", 1);
    while (n < 0 && errno == EINTR);
    errno = saved; /* full: it is awake already */
}

/* Under the mutex: a loop that sleeps gets one byte, and only one. */
static void llmcbi_wake_sleeper(llmcb_loop *loop)
{
    if (!loop->sleeping) return;
    loop->sleeping = false;
    llmcb_loop_wakeup(loop);
}

static void llmcbi_drain_wakeups(llmcb_loop *loop)
{
    char junk[256];
    ssize_t n;

    do n = LLMCBI_SYS(read)(loop->wake_fd[0], junk, sizeof junk);
    while (n == (ssize_t)sizeof junk || (n < 0 && errno == EINTR));
}

LLMCBI_DEF llmcb_code llmcb_loop_post(llmcb_loop *loop, void (*fn)(void *arg),
                                      void *arg)
{
    llmcbi_post *p;

    if (!loop) return LLMCB_ENOMEM;
    if (!fn) return LLMCB_EINVAL;
    p = (llmcbi_post *)llmcbi_alloc(&loop->alloc, sizeof *p);
    if (!p) return LLMCB_ENOMEM;
    p->fn = fn;
    p->arg = arg;
    llmcbi_lock(loop);
    *loop->last_post = p;
    loop->last_post = &p->next;
    llmcbi_wake_sleeper(loop);
    llmcbi_unlock(loop);
    return LLMCB_OK;
}

/* Under the mutex. */
static llmcbi_post *llmcbi_take_posts(llmcb_loop *loop)
{
    llmcbi_post *p = loop->posts;

    loop->posts = NULL;
    loop->last_post = &loop->posts;
    return p;
}

static void llmcbi_run_posts(llmcb_loop *loop, llmcbi_post *p)
{
    llmcbi_post *next;

    for (; p; p = next) {
        next = p->next;
        p->fn(p->arg);
        llmcbi_free(&loop->alloc, p, sizeof *p);
    }
}

/* -- turns */

/* What later sections do in every turn.
 * upward: llmcbi_take_cancels */
static void llmcbi_take_cancels(llmcb_loop *loop);
/* upward: llmcbi_take_jobs */
static void llmcbi_take_jobs(llmcb_loop *loop);
/* upward: llmcbi_pool_idle */
static bool llmcbi_pool_idle(const llmcb_loop *loop);
/* upward: llmcbi_take_progress */
static void llmcbi_take_progress(llmcb_loop *loop, llmcbi_cursor *list);
/* upward: llmcbi_publish */
static void llmcbi_publish(llmcb_loop *loop);

/* How long the loop may wait, and that it does from now on. */
static int64_t llmcbi_prepare(llmcb_loop *loop)
{
    int64_t ms = -1;
    bool idle;

    llmcbi_publish(loop);
    if (!loop->virtual_clock) loop->now = llmcbi_clock_ms();
    if (!llmcbi_list_empty(&loop->ready) || LLMCBI_FLAG_GET(&loop->cancels))
        return 0;
    if (loop->n_timers) {
        ms = loop->heap[1]->due - loop->now;
        if (ms <= 0) return 0;
    }
    llmcbi_lock(loop);
    if (loop->posts || loop->progress_due ||
        (loop->virtual_clock && loop->progress)) {
        llmcbi_unlock(loop);
        return 0;
    }
    idle = llmcbi_pool_idle(loop);
    if (loop->virtual_clock && ms > 0) {
        if (idle && !loop->n_watches) {
            loop->now = loop->heap[1]->due;
            llmcbi_unlock(loop);
            return 0;
        }
        ms = -1; /* only something real can happen first */
    }
    loop->sleeping = true;
    llmcbi_unlock(loop);
    return ms;
}

static void llmcbi_process(llmcb_loop *loop, bool woken)
{
    llmcbi_post *posts;
    llmcbi_cursor *progress;

    loop->turning = true;
    if (woken) llmcbi_drain_wakeups(loop);
    /* in one go: what a handler posted must be seen before its progress */
    llmcbi_lock(loop);
    loop->sleeping = false;
    loop->progress_due = false;
    posts = llmcbi_take_posts(loop);
    progress = loop->progress;
    loop->progress = NULL;
    llmcbi_unlock(loop);
    if (!loop->virtual_clock) loop->now = llmcbi_clock_ms();
    llmcbi_run_posts(loop, posts);
    llmcbi_take_cancels(loop);
    llmcbi_take_jobs(loop);
    llmcbi_take_progress(loop, progress);
    llmcbi_run_timers(loop);
    llmcbi_run_fired(loop);
    llmcbi_run_ready(loop);
    llmcbi_publish(loop);
    loop->turning = false;
}

static void llmcbi_turn(llmcb_loop *loop, int64_t max_ms)
{
    int64_t ms = llmcbi_prepare(loop);

    if (max_ms >= 0 && (ms < 0 || ms > max_ms)) ms = max_ms;
    if (ms > INT_MAX) ms = INT_MAX;
    llmcbi_process(loop, llmcbi_poller_wait(loop, (int)ms));
}

static llmcb_code llmcbi_may_turn(llmcb_loop *loop)
{
    llmcb_code code = llmcbi_enter(loop);

    return code == LLMCB_OK && loop->turning ? LLMCB_ESTATE : code;
}

LLMCBI_DEF llmcb_code llmcb_loop_run_once(llmcb_loop *loop, int64_t max_ms)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (code == LLMCB_OK) llmcbi_turn(loop, max_ms);
    return code;
}

LLMCBI_DEF llmcb_code llmcb_loop_run(llmcb_loop *loop)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (code != LLMCB_OK) return code;
    loop->stopping = false;
    while (loop->n_alive && !loop->stopping) llmcbi_turn(loop, -1);
    return LLMCB_OK;
}

LLMCBI_DEF void llmcb_loop_stop(llmcb_loop *loop)
{
    if (loop) loop->stopping = true;
}

LLMCBI_DEF bool llmcb_loop_alive(const llmcb_loop *loop)
{
    return loop && loop->n_alive > 0;
}

LLMCBI_DEF int64_t llmcb_loop_now(const llmcb_loop *loop)
{
    return loop ? loop->now : 0;
}

LLMCBI_DEF llmcb_code llmcb_clock_advance(llmcb_loop *loop, int64_t ms)
{
    llmcb_code code = llmcbi_enter(loop);

    if (code != LLMCB_OK) return code;
    if (!loop->virtual_clock) return LLMCB_ESTATE;
    if (ms < 0 || ms > INT64_MAX / 2 - loop->now) return LLMCB_EINVAL;
    loop->now += ms;
    return LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_loop_prepare(llmcb_loop *loop,
                                         int64_t *timeout_ms)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (timeout_ms) *timeout_ms = code == LLMCB_OK ? llmcbi_prepare(loop) : -1;
    return code;
}

LLMCBI_DEF size_t llmcb_loop_pollfds(llmcb_loop *loop, struct pollfd *fds,
                                     size_t cap)
{
    if (!loop) return 0;
    if (!fds) cap = 0;
#if LLMCBI_EPOLL
    if (cap) {
        fds[0].fd = loop->epoll_fd;
        fds[0].events = POLLIN;
        fds[0].revents = 0;
    }
    return 1;
#else
    return llmcbi_poller_fill(loop, fds, cap);
#endif
}

LLMCBI_DEF llmcb_code llmcb_loop_dispatch(llmcb_loop *loop,
                                          const struct pollfd *fds, size_t n)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (code != LLMCB_OK) return code;
#if LLMCBI_EPOLL
    (void)fds;
    (void)n;
    llmcbi_process(loop, llmcbi_poller_wait(loop, 0));
#else
    llmcbi_process(loop, llmcbi_poller_take(loop, fds, fds ? n : 0));
#endif
    return LLMCB_OK;
}

static void llmcbi_host_update(llmcb_loop *loop)
{
    int64_t ms;

    if (!loop->host.timer) return;
    ms = llmcbi_prepare(loop);
    if (ms < 0 && loop->host_timer == -1) return;
    loop->host_timer = ms;
    loop->host.timer(loop->host.user, ms);
}

LLMCBI_DEF llmcb_code llmcb_loop_set_host(llmcb_loop *loop,
                                          const llmcb_host *host)
{
    llmcb_code code = llmcbi_may_turn(loop);
    llmcb_host none;
    size_t i;

    if (code != LLMCB_OK) return code;
    if (host && (!host->watch || !host->timer)) return LLMCB_EINVAL;
    memset(&none, 0, sizeof none);
    for (i = 0; i < 2; i++) { /* take leave of the old, greet the new */
        size_t k;
        if (i) loop->host = host ? *host : none;
        if (!loop->host.watch) continue;
        if (LLMCBI_EPOLL) {
            loop->host.watch(loop->host.user, loop->epoll_fd,
                             i ? LLMCB_READ : 0);
            continue;
        }
        loop->host.watch(loop->host.user, loop->wake_fd[0],
                         i ? LLMCB_READ : 0);
        for (k = 0; k < loop->n_watches; k++)
            loop->host.watch(loop->host.user, loop->watches[k]->fd,
                             i ? loop->watches[k]->events : 0);
    }
    loop->host_timer = -2;
    llmcbi_host_update(loop);
    return LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_loop_fd_event(llmcb_loop *loop, int fd,
                                          int events)
{
    llmcb_code code = llmcbi_may_turn(loop);
    bool woken;

    if (code != LLMCB_OK) return code;
#if LLMCBI_EPOLL
    (void)fd;
    (void)events;
    woken = llmcbi_poller_wait(loop, 0);
#else
    {
        struct pollfd one;
        one.fd = fd;
        one.events = 0;
        one.revents = (short)((events & LLMCB_READ ? POLLIN : 0) |
                              (events & LLMCB_WRITE ? POLLOUT : 0));
        woken = llmcbi_poller_take(loop, &one, 1);
    }
#endif
    llmcbi_process(loop, woken);
    llmcbi_host_update(loop);
    return LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_loop_timer_event(llmcb_loop *loop)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (code != LLMCB_OK) return code;
    loop->host_timer = -1; /* it was a one-shot */
    loop->n_fired = 0;
    llmcbi_process(loop, false);
    llmcbi_host_update(loop);
    return LLMCB_OK;
}

/* -- life */

LLMCBI_DEF llmcb_loop *llmcb_loop_new(const llmcb_loop_desc *desc)
{
    llmcb_loop_desc zero;
    llmcb_loop *loop;
    llmcb_allocator a;

    memset(&zero, 0, sizeof zero);
    if (!desc) desc = &zero;
    a = desc->allocator;
    if (!a.resize) {
        a.resize = llmcbi_default_resize;
        a.user = NULL;
    }
    loop = (llmcb_loop *)llmcbi_alloc(&a, sizeof *loop);
    if (!loop) return NULL;
    loop->alloc = a;
    loop->log = desc->log;
    loop->log_user = desc->log_user;
    loop->shutdown_ms = desc->shutdown_ms > 0 ? desc->shutdown_ms : 5000;
    loop->workers = desc->workers ? desc->workers : 4;
    if (loop->workers < 2) loop->workers = 2;
    if (loop->workers > 64) loop->workers = 64;
    loop->worker_stack =
        desc->worker_stack ? desc->worker_stack : (size_t)256 * 1024;
    loop->virtual_clock = desc->virtual_clock;
    loop->now = desc->virtual_clock ? 0 : llmcbi_clock_ms();
    loop->pid = getpid();
    loop->last_post = &loop->posts;
    loop->epoll_fd = -1;
    llmcbi_list_init(&loop->ready);
    llmcbi_list_init(&loop->round);
    llmcbi_random_seed(&loop->random);
    if (LLMCBI_SYS(pipe)(loop->wake_fd) != 0) goto no_pipe;
    if (!llmcbi_cloexec_nonblock(loop->wake_fd[0]) ||
        !llmcbi_cloexec_nonblock(loop->wake_fd[1]) ||
        !llmcbi_poller_open(loop))
        goto no_poller;
    if (pthread_mutex_init(&loop->mutex, NULL) != 0) goto no_poller;
    return loop;
no_poller:
    llmcbi_poller_close(loop);
    LLMCBI_SYS(close)(loop->wake_fd[0]);
    LLMCBI_SYS(close)(loop->wake_fd[1]);
no_pipe:
    llmcbi_free(&a, loop, sizeof *loop);
    return NULL;
}

/* ==== [TASK] operations and coroutines ================================= */

typedef struct llmcbi_op_class {
    /* Bring it to its end, now or later. */
    void (*cancel)(llmcb_op *op, llmcb_detail detail);
    /* It is done and nobody holds it. */
    void (*destroy)(llmcb_op *op);
    /* Somebody waits for its end and not for its parts; may be NULL. */
    void (*waited)(llmcb_op *op);
} llmcbi_op_class;

typedef struct llmcbi_task llmcbi_task;

/* One task that awaits one op. */
typedef struct llmcbi_waiter {
    struct llmcbi_waiter *prev, *next;
    llmcb_op *op; /* NULL: not waiting */
    llmcbi_task *task;
} llmcbi_waiter;

struct llmcb_op {
    llmcb_loop *loop;
    const llmcbi_op_class *cls;
    llmcb_op *prev, *next;
    llmcbi_waiter *waiters;
    const llmcb_error *error; /* of a done op */
    bool done;
    bool detached; /* the program has freed it */
    llmcbi_flag cancel_wanted;
};

static void llmcbi_op_init(llmcb_loop *loop, llmcb_op *op,
                           const llmcbi_op_class *cls)
{
    op->loop = loop;
    op->cls = cls;
    op->next = loop->ops;
    if (op->next) op->next->prev = op;
    loop->ops = op;
    loop->n_alive++;
}

static void llmcbi_op_destroy(llmcb_op *op)
{
    llmcb_loop *loop = op->loop;

    if (op->next) op->next->prev = op->prev;
    if (op->prev) op->prev->next = op->next;
    else loop->ops = op->next;
    llmcbi_error_drop(&loop->alloc, op->error);
    op->cls->destroy(op);
}

static void llmcbi_task_told(llmcbi_waiter *w);

/* The end of op, with an error that it then owns. May destroy op. */
static void llmcbi_op_finish(llmcb_op *op, const llmcb_error *error)
{
    op->error = error;
    op->done = true;
    op->loop->n_alive--;
    while (op->waiters) llmcbi_task_told(op->waiters);
    if (op->detached) llmcbi_op_destroy(op);
}

LLMCBI_DEF bool llmcb_op_done(const llmcb_op *op)
{
    return !op || op->done;
}

LLMCBI_DEF llmcb_code llmcb_op_code(const llmcb_op *op)
{
    if (!op) return LLMCB_ENOMEM;
    return op->done ? op->error->code : LLMCB_EBUSY;
}

LLMCBI_DEF const llmcb_error *llmcb_op_error(const llmcb_op *op)
{
    if (op && op->done) return op->error;
    return llmcbi_error_const(op ? LLMCB_OK : LLMCB_ENOMEM);
}

LLMCBI_DEF void llmcb_op_cancel(llmcb_op *op)
{
    if (!op) return;
    LLMCBI_FLAG_SET(&op->cancel_wanted, 1);
    LLMCBI_FLAG_SET(&op->loop->cancels, 1);
    llmcb_loop_wakeup(op->loop);
}

static void llmcbi_take_cancels(llmcb_loop *loop)
{
    llmcb_op *op, *next;

    if (!LLMCBI_FLAG_GET(&loop->cancels)) return;
    LLMCBI_FLAG_SET(&loop->cancels, 0);
    for (op = loop->ops; op; op = next) {
        next = op->next; /* cancel destroys no other op */
        if (!LLMCBI_FLAG_GET(&op->cancel_wanted)) continue;
        LLMCBI_FLAG_SET(&op->cancel_wanted, 0);
        if (!op->done)
            op->cls->cancel(op, op->detached ? LLMCB_DETAIL_CONSUMER
                                             : LLMCB_DETAIL_CALLER);
    }
}

LLMCBI_DEF void llmcb_op_free(llmcb_op *op)
{
    llmcb_loop *loop;

    if (!op) return;
    loop = op->loop;
    op->detached = true;
    if (op->done) {
        llmcbi_op_destroy(op);
        return;
    }
    while (op->waiters) llmcbi_task_told(op->waiters);
    LLMCBI_FLAG_SET(&op->cancel_wanted, 1);
    LLMCBI_FLAG_SET(&loop->cancels, 1);
    if (loop->host.timer && !loop->turning) llmcbi_host_update(loop);
}

LLMCBI_DEF llmcb_code llmcb_loop_run_until(llmcb_loop *loop, llmcb_op *op)
{
    llmcb_code code;

    if (!op) return LLMCB_ENOMEM;
    if (op->loop != loop) return LLMCB_EINVAL;
    code = llmcbi_enter(loop);
    if (code != LLMCB_OK) return code;
    if (op->done) return op->error->code;
    if (loop->turning) return LLMCB_ESTATE;
    if (op->cls->waited) op->cls->waited(op);
    loop->stopping = false;
    while (!op->done && !loop->stopping) llmcbi_turn(loop, -1);
    return llmcb_op_code(op);
}

LLMCBI_DEF llmcb_code llmcb_op_wait(llmcb_op *op)
{
    return op ? llmcb_loop_run_until(op->loop, op) : LLMCB_ENOMEM;
}

/* A coroutine, of an op or of a handler. */
struct llmcbi_task {
    llmcb_task pub;
    llmcb_loop *loop;
    llmcb_step (*step)(llmcbi_task *t);             /* calls the function */
    void (*finish)(llmcbi_task *t, llmcb_code code); /* it has ended */
    llmcbi_ready ready;
    llmcbi_timer timer;
    llmcbi_waiter waiter;
    llmcbi_waiter *many; /* of llmcb_await_all and llmcb_await_any */
    size_t n_many, n_left;
    llmcbi_watch watch;
    llmcb_op *owned; /* freed when the await ends */
    void *owner;     /* for step and finish */
    const void *home; /* the chat op that a handler's task belongs to */
    bool armed;      /* suspended, or about to be */
    bool any;        /* one of `many` is enough */
    bool timing_out; /* the timer is a limit, not the thing awaited */
    bool cancelled;  /* told at the next await */
};

static void llmcbi_waiter_leave(llmcbi_waiter *w)
{
    if (!w->op) return;
    if (w->next) w->next->prev = w->prev;
    if (w->prev) w->prev->next = w->next;
    else w->op->waiters = w->next;
    w->op = NULL;
}

static void llmcbi_waiter_join(llmcbi_waiter *w, llmcbi_task *t, llmcb_op *op)
{
    w->task = t;
    w->op = op;
    w->prev = NULL;
    w->next = op->waiters;
    if (w->next) w->next->prev = w;
    op->waiters = w;
    if (op->cls->waited) op->cls->waited(op);
}

static void llmcbi_task_disarm(llmcbi_task *t)
{
    size_t i;

    llmcbi_timer_stop(t->loop, &t->timer);
    llmcbi_watch_set(t->loop, &t->watch, -1, 0);
    llmcbi_waiter_leave(&t->waiter);
    for (i = 0; i < t->n_many; i++) llmcbi_waiter_leave(&t->many[i]);
    llmcbi_free(&t->loop->alloc, t->many, t->n_many * sizeof *t->many);
    t->many = NULL;
    t->n_many = 0;
    if (t->owned) {
        llmcb_op *op = t->owned;
        t->owned = NULL;
        if (op->done) op->detached = true; /* its finish destroys it */
        else llmcb_op_free(op);
    }
}

/* Ends the present await. */
static void llmcbi_task_wake(llmcbi_task *t, llmcb_code result)
{
    llmcbi_task_disarm(t);
    t->pub.result = result;
    llmcbi_make_ready(t->loop, &t->ready);
}

static void llmcbi_task_timer(llmcbi_timer *timer)
{
    llmcbi_task *t = (llmcbi_task *)(void *)((char *)timer -
                                     offsetof(llmcbi_task, timer));

    llmcbi_task_wake(t, t->timing_out ? LLMCB_ETIMEDOUT : LLMCB_OK);
}

static void llmcbi_task_watch(llmcbi_watch *watch, int events)
{
    llmcbi_task *t = (llmcbi_task *)(void *)((char *)watch -
                                     offsetof(llmcbi_task, watch));

    (void)events;
    llmcbi_task_wake(t, LLMCB_OK);
}

/* The code of an op that a waiter was told of; one that was freed under way
 * counts as cancelled. */
static llmcb_code llmcbi_awaited_code(const llmcb_op *op)
{
    return op->done ? op->error->code : LLMCB_ECANCELLED;
}

static void llmcbi_task_told(llmcbi_waiter *w)
{
    llmcbi_task *t = w->task;
    llmcb_code code = llmcbi_awaited_code(w->op);

    if (!t->many) {
        llmcbi_task_wake(t, code);
        return;
    }
    if (t->any) {
        t->pub.index = (size_t)(w - t->many);
        llmcbi_task_wake(t, code);
        return;
    }
    llmcbi_waiter_leave(w);
    if (code != LLMCB_OK && (size_t)(w - t->many) < t->pub.index) {
        t->pub.index = (size_t)(w - t->many);
        t->pub.result = code;
    }
    if (--t->n_left == 0) llmcbi_task_wake(t, t->pub.result);
}

static void llmcbi_task_run(llmcbi_ready *r)
{
    llmcbi_task *t = (llmcbi_task *)(void *)((char *)r -
                                             offsetof(llmcbi_task, ready));
    llmcb_step step;

    t->armed = false;
    step = t->step(t);
    if (step == LLMCB_WAIT && t->armed) return;
    /* it says that it waits, but for nothing; or it ends while it waits */
    if (step > 0) step = LLMCB_ESTATE;
    llmcbi_unready(&t->ready);
    llmcbi_task_disarm(t);
    t->finish(t, (llmcb_code)step);
}

static bool llmcbi_task_init(llmcb_loop *loop, llmcbi_task *t)
{
    t->loop = loop;
    t->ready.fn = llmcbi_task_run;
    t->watch.fn = llmcbi_task_watch;
    return llmcbi_timer_init(loop, &t->timer, llmcbi_task_timer);
}

static void llmcbi_task_cancel(llmcbi_task *t)
{
    t->cancelled = true;
    if (t->armed && !t->ready.next) {
        t->cancelled = false;
        llmcbi_task_wake(t, LLMCB_ECANCELLED);
    }
}

/* The beginning of every await. NULL: it has ended already. */
static llmcbi_task *llmcbi_await(llmcb_task *pub)
{
    llmcbi_task *t = (llmcbi_task *)(void *)pub;

    llmcbi_task_disarm(t);
    t->armed = true;
    t->timing_out = false;
    t->pub.result = LLMCB_OK;
    if (t->cancelled || t->loop->freeing) {
        t->cancelled = false;
        llmcbi_task_wake(t, LLMCB_ECANCELLED);
        return NULL;
    }
    return t;
}

static llmcb_step llmcbi_await_over(llmcbi_task *t, llmcb_code code)
{
    llmcbi_task_wake(t, code);
    return LLMCB_WAIT;
}

static void llmcbi_await_limit(llmcbi_task *t, int64_t ms)
{
    if (ms < 0) return;
    t->timing_out = true;
    llmcbi_timer_start(t->loop, &t->timer, ms);
}

LLMCBI_DEF llmcb_loop *llmcb_task_loop(const llmcb_task *t)
{
    return t ? ((const llmcbi_task *)(const void *)t)->loop : NULL;
}

LLMCBI_DEF llmcb_step llmcb_sleep(llmcb_task *pub, int64_t ms)
{
    llmcbi_task *t = llmcbi_await(pub);

    if (t) llmcbi_timer_start(t->loop, &t->timer, ms);
    return LLMCB_WAIT;
}

LLMCBI_DEF llmcb_step llmcb_await_fd(llmcb_task *pub, int fd, int events,
                                     int64_t timeout_ms)
{
    llmcbi_task *t = llmcbi_await(pub);
    llmcb_code code;
    size_t i;

    if (!t) return LLMCB_WAIT;
    if (fd < 0 || !events || events & ~(LLMCB_READ | LLMCB_WRITE))
        return llmcbi_await_over(t, LLMCB_EINVAL);
    for (i = 0; i < t->loop->n_watches; i++)
        if (t->loop->watches[i]->fd == fd)
            return llmcbi_await_over(t, LLMCB_EBUSY);
    code = llmcbi_watch_set(t->loop, &t->watch, fd, events);
    if (code != LLMCB_OK) return llmcbi_await_over(t, code);
    llmcbi_await_limit(t, timeout_ms);
    return LLMCB_WAIT;
}

/* Why op cannot be awaited by t, or LLMCB_OK. */
static llmcb_code llmcbi_awaitable(const llmcbi_task *t, const llmcb_op *op)
{
    if (!op) return LLMCB_ENOMEM;
    if (op->loop != t->loop) return LLMCB_EINVAL;
    return t->home == op ? LLMCB_ESTATE : LLMCB_OK;
}

LLMCBI_DEF llmcb_step llmcb_await(llmcb_task *pub, llmcb_op *op)
{
    llmcbi_task *t = llmcbi_await(pub);
    llmcb_code code;

    if (!t) return LLMCB_WAIT;
    code = llmcbi_awaitable(t, op);
    if (code != LLMCB_OK) return llmcbi_await_over(t, code);
    if (op->done) return llmcbi_await_over(t, op->error->code);
    llmcbi_waiter_join(&t->waiter, t, op);
    return LLMCB_WAIT;
}

static llmcb_step llmcbi_await_many(llmcb_task *pub, llmcb_op *const *ops,
                                    size_t n, int64_t timeout_ms, bool any)
{
    llmcbi_task *t = llmcbi_await(pub);
    llmcb_code code = LLMCB_OK;
    size_t i, first = n;

    if (!t) return LLMCB_WAIT;
    if (n && !ops) return llmcbi_await_over(t, LLMCB_EINVAL);
    for (i = 0; i < n; i++) {
        code = llmcbi_awaitable(t, ops[i]);
        if (code != LLMCB_OK) return llmcbi_await_over(t, code);
    }
    t->any = any;
    t->n_left = 0;
    for (i = 0; i < n; i++) {
        if (!ops[i]->done) {
            t->n_left++;
        } else if (first == n && (any || ops[i]->error->code != LLMCB_OK)) {
            first = i;
            code = ops[i]->error->code;
        }
    }
    t->pub.index = first;
    if (t->n_left == 0 || (any && first < n))
        return llmcbi_await_over(t, code);
    t->many = (llmcbi_waiter *)llmcbi_alloc(&t->loop->alloc,
                                            n * sizeof *t->many);
    if (!t->many) return llmcbi_await_over(t, LLMCB_ENOMEM);
    t->n_many = n;
    t->pub.result = code;
    for (i = 0; i < n; i++)
        if (!ops[i]->done) llmcbi_waiter_join(&t->many[i], t, ops[i]);
    llmcbi_await_limit(t, timeout_ms);
    return LLMCB_WAIT;
}

LLMCBI_DEF llmcb_step llmcb_await_all(llmcb_task *t, llmcb_op *const *ops,
                                      size_t n, int64_t timeout_ms)
{
    return llmcbi_await_many(t, ops, n, timeout_ms, false);
}

LLMCBI_DEF llmcb_step llmcb_await_any(llmcb_task *t, llmcb_op *const *ops,
                                      size_t n, int64_t timeout_ms)
{
    return llmcbi_await_many(t, ops, n, timeout_ms, true);
}

LLMCBI_DEF llmcb_step llmcb_await_blocking(llmcb_task *pub,
                                           int (*fn)(void *arg), void *arg)
{
    llmcbi_task *t = llmcbi_await(pub);
    llmcb_op *op;

    if (!t) return LLMCB_WAIT;
    if (!fn) return llmcbi_await_over(t, LLMCB_EINVAL);
    op = llmcb_offload(t->loop, fn, arg);
    if (!op) return llmcbi_await_over(t, LLMCB_ENOMEM);
    if (op->done) {
        llmcb_code code = op->error->code;
        llmcb_op_free(op);
        return llmcbi_await_over(t, code);
    }
    llmcbi_waiter_join(&t->waiter, t, op);
    t->owned = op;
    return LLMCB_WAIT;
}

/* A coroutine that is an operation of its own. */
typedef struct llmcbi_task_op {
    llmcb_op op;
    llmcbi_task task;
    llmcb_task_fn fn;
    size_t size; /* with the frame behind it */
} llmcbi_task_op;

static llmcbi_task_op *llmcbi_task_op_of(llmcbi_task *t)
{
    return (llmcbi_task_op *)(void *)((char *)t -
                                      offsetof(llmcbi_task_op, task));
}

static llmcb_step llmcbi_task_op_step(llmcbi_task *t)
{
    return llmcbi_task_op_of(t)->fn(&t->pub);
}

static void llmcbi_task_op_finish(llmcbi_task *t, llmcb_code code)
{
    llmcbi_op_finish(&llmcbi_task_op_of(t)->op, llmcbi_error_const(code));
}

static void llmcbi_task_op_cancel(llmcb_op *op, llmcb_detail detail)
{
    (void)detail;
    llmcbi_task_cancel(&((llmcbi_task_op *)(void *)op)->task);
}

static void llmcbi_task_op_destroy(llmcb_op *op)
{
    llmcbi_task_op *o = (llmcbi_task_op *)(void *)op;

    llmcbi_timer_free(op->loop, &o->task.timer);
    llmcbi_free(&op->loop->alloc, o, o->size);
}

#define LLMCBI_ALIGN(n) (((n) + 15) & ~(size_t)15)

LLMCBI_DEF llmcb_op *llmcb_task_start(llmcb_loop *loop, llmcb_task_fn fn,
                                      size_t frame_size, void *self)
{
    static const llmcbi_op_class cls = { llmcbi_task_op_cancel,
                                         llmcbi_task_op_destroy, NULL };
    llmcbi_task_op *o;
    size_t head = LLMCBI_ALIGN(sizeof *o);

    if (!loop || !fn || loop->freeing || frame_size > SIZE_MAX / 2)
        return NULL;
    o = (llmcbi_task_op *)llmcbi_alloc(&loop->alloc, head + frame_size);
    if (!o) return NULL;
    o->size = head + frame_size;
    o->fn = fn;
    o->task.step = llmcbi_task_op_step;
    o->task.finish = llmcbi_task_op_finish;
    o->task.pub.self = self;
    o->task.pub.frame = (char *)o + head;
    if (!llmcbi_task_init(loop, &o->task)) {
        llmcbi_free(&loop->alloc, o, o->size);
        return NULL;
    }
    llmcbi_op_init(loop, &o->op, &cls);
    o->task.armed = true;
    llmcbi_make_ready(loop, &o->task.ready);
    return &o->op;
}

/* ==== [EXEC] thread pool, strands, offload ============================= */

/* A blocking function on its way through the pool. It outlives its op. */
typedef struct llmcbi_job {
    struct llmcbi_job *next;
    int (*fn)(void *arg);
    void *arg;
    int result;
    llmcb_loop *loop;
    void (*done)(struct llmcbi_job *job); /* on the loop's thread */
    void *owner;                          /* for done; NULL: gone */
} llmcbi_job;

/* Work that must not run twice at a time: the calls of one handler. Queued
 * on the pool while it has cursors to serve. */
typedef struct llmcbi_strand {
    struct llmcbi_strand *next;      /* in the pool's queue */
    llmcbi_cursor *first, **last;    /* cursors with events to run */
    bool queued;                     /* or running */
    bool urgent;                     /* has a start or a finish */
    const llmcb_handler *handler;
    size_t users;                    /* cursors that belong to it */
    struct llmcbi_strand *next_known; /* in the pool's list */
} llmcbi_strand;

struct llmcbi_pool {
    pthread_cond_t cond;
    unsigned n_threads, n_idle, n_exited;
    unsigned n_strands, n_jobs; /* threads that run one of them */
    bool stop;
    llmcbi_job *jobs, **last_job;
    llmcbi_job *finished;
    llmcbi_strand *strands, **last_strand;
    llmcbi_strand *known;
    pthread_t threads[64];
};

/* Under the mutex. */
static bool llmcbi_pool_idle(const llmcb_loop *loop)
{
    const llmcbi_pool *p = loop->pool;

    return !p || (!p->strands && !p->jobs && !p->finished && !p->n_strands &&
                  !p->n_jobs);
}

/* Runs some events of a strand; called and returns with the mutex held.
 * upward: llmcbi_strand_run */
static void llmcbi_strand_run(llmcb_loop *loop, llmcbi_strand *s);

/* Each kind of work leaves one thread to the other. */
static bool llmcbi_pool_has_work(const llmcbi_pool *p, bool *strand)
{
    unsigned most = p->n_threads > 1 ? p->n_threads - 1 : 1;
    bool strands = p->strands && p->n_strands < most;
    bool jobs = p->jobs && p->n_jobs < most;

    *strand = strands;
    return strands || jobs;
}

static void llmcbi_pool_job(llmcb_loop *loop, llmcbi_pool *p)
{
    llmcbi_job *job = p->jobs;

    p->jobs = job->next;
    if (!p->jobs) p->last_job = &p->jobs;
    p->n_jobs++;
    llmcbi_unlock(loop);
    job->result = job->fn(job->arg);
    llmcbi_lock(loop);
    p->n_jobs--;
    job->next = p->finished;
    p->finished = job;
    loop->progress_due = true;
    llmcbi_wake_sleeper(loop);
}

static void *llmcbi_worker(void *arg)
{
    llmcb_loop *loop = (llmcb_loop *)arg;
    llmcbi_pool *p = loop->pool;
    bool strand;

    llmcbi_lock(loop);
    for (;;) {
        if (!llmcbi_pool_has_work(p, &strand)) {
            if (p->stop) break;
            p->n_idle++;
            pthread_cond_wait(&p->cond, &loop->mutex);
            p->n_idle--;
            continue;
        }
        if (strand) {
            llmcbi_strand *s = p->strands;
            p->strands = s->next;
            if (!p->strands) p->last_strand = &p->strands;
            p->n_strands++;
            /* a woken worker wakes the next */
            if (p->n_idle && llmcbi_pool_has_work(p, &strand))
                pthread_cond_signal(&p->cond);
            llmcbi_strand_run(loop, s);
            p->n_strands--;
        } else {
            llmcbi_pool_job(loop, p);
        }
        /* a virtual clock waits for this */
        if (loop->virtual_clock && llmcbi_pool_idle(loop))
            llmcbi_wake_sleeper(loop);
    }
    p->n_exited++;
    llmcb_loop_wakeup(loop);
    llmcbi_unlock(loop);
    return NULL;
}

/* Threads are made when the first is needed. */
static llmcb_code llmcbi_pool_start(llmcb_loop *loop, int *sys_errno)
{
    llmcbi_pool *p = loop->pool;
    pthread_attr_t attr;
    sigset_t all, before;
    int failed = 0;

    if (p && p->n_threads) return LLMCB_OK;
    if (!p) {
        p = (llmcbi_pool *)llmcbi_alloc(&loop->alloc, sizeof *p);
        if (!p) return LLMCB_ENOMEM;
        if (pthread_cond_init(&p->cond, NULL) != 0) {
            llmcbi_free(&loop->alloc, p, sizeof *p);
            return LLMCB_ENOMEM;
        }
        p->last_job = &p->jobs;
        p->last_strand = &p->strands;
        loop->pool = p;
    }
    pthread_attr_init(&attr);
    /* a size that the system refuses leaves its default */
    (void)pthread_attr_setstacksize(&attr, loop->worker_stack);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    llmcbi_lock(loop);
    while (p->n_threads < loop->workers && !failed) {
        failed = LLMCBI_SYS(pthread_create)(&p->threads[p->n_threads], &attr,
                                            llmcbi_worker, loop);
        if (!failed) p->n_threads++;
    }
    llmcbi_unlock(loop);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    if (sys_errno) *sys_errno = p->n_threads ? 0 : failed;
    return p->n_threads ? LLMCB_OK : LLMCB_ESYS;
}

static llmcbi_job *llmcbi_job_start(llmcb_loop *loop, int (*fn)(void *arg),
                                    void *arg, void (*done)(llmcbi_job *),
                                    void *owner, llmcb_code *code)
{
    llmcbi_pool *p;
    llmcbi_job *job;

    *code = llmcbi_pool_start(loop, NULL);
    if (*code != LLMCB_OK) return NULL;
    job = (llmcbi_job *)llmcbi_alloc(&loop->alloc, sizeof *job);
    if (!job) {
        *code = LLMCB_ENOMEM;
        return NULL;
    }
    job->fn = fn;
    job->arg = arg;
    job->done = done;
    job->owner = owner;
    job->loop = loop;
    p = loop->pool;
    llmcbi_lock(loop);
    *p->last_job = job;
    p->last_job = &job->next;
    if (p->n_idle) pthread_cond_signal(&p->cond);
    llmcbi_unlock(loop);
    return job;
}

/* Tells the owners of finished jobs. */
static void llmcbi_take_jobs(llmcb_loop *loop)
{
    llmcbi_job *job = NULL, *next, *in_order = NULL;

    if (!loop->pool) return;
    llmcbi_lock(loop);
    job = loop->pool->finished;
    loop->pool->finished = NULL;
    llmcbi_unlock(loop);
    for (; job; job = next) {
        next = job->next;
        job->next = in_order;
        in_order = job;
    }
    for (job = in_order; job; job = next) {
        next = job->next;
        job->done(job);
        llmcbi_free(&loop->alloc, job, sizeof *job);
    }
}

typedef struct llmcbi_offload_op {
    llmcb_op op;
    llmcbi_job *job;
} llmcbi_offload_op;

static void llmcbi_offload_done(llmcbi_job *job)
{
    llmcbi_offload_op *o = (llmcbi_offload_op *)job->owner;

    if (!o) return;
    o->job = NULL;
    llmcbi_op_finish(&o->op,
                     llmcbi_error_const((llmcb_code)(job->result > 0
                                                         ? LLMCB_EHANDLER
                                                         : job->result)));
}

static void llmcbi_offload_cancel(llmcb_op *op, llmcb_detail detail)
{
    llmcbi_offload_op *o = (llmcbi_offload_op *)(void *)op;
    llmcbi_pool *p = op->loop->pool;
    llmcbi_job **at;

    (void)detail;
    o->job->owner = NULL;
    llmcbi_lock(op->loop);
    for (at = &p->jobs; *at && *at != o->job; at = &(*at)->next) continue;
    if (*at) { /* it has not begun */
        *at = o->job->next;
        if (!*at) p->last_job = at;
    } else {
        o->job = NULL;
    }
    llmcbi_unlock(op->loop);
    llmcbi_free(&op->loop->alloc, o->job, sizeof *o->job);
    o->job = NULL;
    llmcbi_op_finish(op, llmcbi_error_const(LLMCB_ECANCELLED));
}

static void llmcbi_offload_destroy(llmcb_op *op)
{
    llmcbi_free(&op->loop->alloc, op, sizeof(llmcbi_offload_op));
}

LLMCBI_DEF llmcb_op *llmcb_offload(llmcb_loop *loop, int (*fn)(void *arg),
                                   void *arg)
{
    static const llmcbi_op_class cls = { llmcbi_offload_cancel,
                                         llmcbi_offload_destroy, NULL };
    llmcbi_offload_op *o;
    llmcb_code code;

    if (!loop || !fn || loop->freeing) return NULL;
    o = (llmcbi_offload_op *)llmcbi_alloc(&loop->alloc, sizeof *o);
    if (!o) return NULL;
    llmcbi_op_init(loop, &o->op, &cls);
    o->job = llmcbi_job_start(loop, fn, arg, llmcbi_offload_done, o, &code);
    if (!o->job) llmcbi_op_finish(&o->op, llmcbi_error_const(code));
    return &o->op;
}

/* ==== [RUN] runs, the run's log of events ============================== */

LLMCBI_DEF const char *llmcb_event_name(llmcb_event_kind kind)
{
    static const char *const names[] = {
        "on_llm_start",       "on_chat_model_start", "on_llm_new_token",
        "on_llm_end",         "on_llm_error",        "on_chain_start",
        "on_chain_end",       "on_chain_error",      "on_agent_action",
        "on_agent_finish",    "on_tool_start",       "on_tool_end",
        "on_tool_error",      "on_retriever_start",  "on_retriever_end",
        "on_retriever_error", "on_text",             "on_retry",
        "on_custom_event"
    };

    return (unsigned)kind < LLMCB_N_EVENTS ? names[kind] : "";
}

/* An event as it stands in the log, its payload behind it. Start and finish
 * are no records: they are part of the run and cannot fail. */
typedef struct llmcbi_record {
    uint32_t size; /* bytes to the next record */
    uint32_t kind; /* llmcb_event_kind, or LLMCBI_JUMP */
} llmcbi_record;

#define LLMCBI_JUMP 0xFFFFu

/* Where the log goes on. There is room for one behind each block's last
 * record, and one is the beginning of every log. */
typedef struct llmcbi_jump {
    llmcbi_record head;
    const char *to;
} llmcbi_jump;

/* Only the loop's thread looks at block headers. */
struct llmcbi_block {
    llmcbi_block *next;
    size_t size;        /* of it all */
    uint64_t first_seq; /* of the first record */
};

#define LLMCBI_BLOCK_SIZE 1024u
#define LLMCBI_MAX_SPARE 64u

/* The life of a run. */
typedef enum llmcbi_run_state {
    LLMCBI_RUN_NEW,
    LLMCBI_RUN_STARTING, /* the start event is being delivered */
    LLMCBI_RUN_OPEN,     /* events may be appended */
    LLMCBI_RUN_DRAINING, /* the outcome is known, earlier events remain */
    LLMCBI_RUN_DRAINED,  /* all are done with those */
    LLMCBI_RUN_FINISHING, /* the end or error event is being delivered */
    LLMCBI_RUN_DONE
} llmcbi_run_state;

typedef struct llmcbi_run llmcbi_run;

struct llmcbi_run {
    llmcb_run pub;
    llmcb_loop *loop;
    void *owner;
    /* A barrier was reached, there is room again, or a handler failed. */
    void (*told)(llmcbi_run *run);
    llmcbi_ready ready; /* the pump */
    llmcbi_timer patience; /* handler_ms; used if that is set */
    llmcbi_block *first, *last;
    char *tail, *tail_end; /* the free part of the last block */
    llmcbi_jump anchor;    /* where cursors begin */
    uint64_t head;         /* events so far, with start and finish */
    uint64_t finish_seq;   /* 0: none yet */
    size_t held;           /* bytes in blocks */
    size_t window_events, window_bytes;
    int64_t handler_ms;
    const llmcb_start *start;
    const llmcb_result *result;
    const llmcb_error *error; /* of the finish event */
    llmcb_event_kind finish_kind;
    llmcbi_cursor *cursors; /* inline handlers first */
    size_t n_cursors;
    uint64_t pull;     /* events that the pull interface has passed */
    const char *pull_pos;
    uint64_t slowest;  /* as of the last pump: no cursor is behind it */
    uint64_t mark;     /* cursors are to tell when they reach it */
    const llmcb_handler *raised_by; /* the first LLMCB_RAISE failure */
    int raised_result;
    llmcb_event_kind raised_in;
    uint8_t state;
    bool has_pull;
    bool lockstep;  /* some handler has LLMCB_AWAIT_EACH */
    bool starved;   /* the owner waits for room */
    bool skipping;  /* cancelled: cursors jump to the finish */
    bool abandoned; /* a handler was too slow; its cursors are given up */
};

/* The legal moves: each state goes to the next or, on a cancel, a failure
 * or before anything was told, to one further on. */
static bool llmcbi_run_may_move(llmcbi_run_state from, llmcbi_run_state to)
{
    static const uint8_t legal[] = {
        /* NEW */ 1 << LLMCBI_RUN_STARTING | 1 << LLMCBI_RUN_DONE,
        /* STARTING */ 1 << LLMCBI_RUN_OPEN | 1 << LLMCBI_RUN_DRAINING,
        /* OPEN */ 1 << LLMCBI_RUN_DRAINING,
        /* DRAINING */ 1 << LLMCBI_RUN_DRAINED,
        /* DRAINED */ 1 << LLMCBI_RUN_FINISHING,
        /* FINISHING */ 1 << LLMCBI_RUN_DONE,
        /* DONE */ 0
    };

    return (legal[from] >> to & 1) != 0;
}

static void llmcbi_run_set_state(llmcbi_run *run, llmcbi_run_state to)
{
    LLMCB_ASSERT(llmcbi_run_may_move((llmcbi_run_state)run->state, to));
    if (llmcbi_run_may_move((llmcbi_run_state)run->state, to))
        run->state = (uint8_t)to;
}

/* Under ASan nothing is used again, so that a stale pointer is found. */
#if defined(__SANITIZE_ADDRESS__)
#define LLMCBI_SPARE 0u
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LLMCBI_SPARE 0u
#endif
#endif
#ifndef LLMCBI_SPARE
#define LLMCBI_SPARE LLMCBI_MAX_SPARE
#endif

static llmcbi_block *llmcbi_block_get(llmcb_loop *loop, size_t size)
{
    llmcbi_block *b;

    if (size <= LLMCBI_BLOCK_SIZE) {
        size = LLMCBI_BLOCK_SIZE;
        b = loop->spare;
        if (b) {
            loop->spare = b->next;
            loop->n_spare--;
            b->next = NULL;
            return b;
        }
    }
    b = (llmcbi_block *)llmcbi_resize(&loop->alloc, NULL, 0, size);
    if (!b) return NULL;
    b->size = size;
    b->next = NULL;
    return b;
}

static void llmcbi_block_put(llmcb_loop *loop, llmcbi_block *b)
{
    if (b->size == LLMCBI_BLOCK_SIZE && loop->n_spare < LLMCBI_SPARE) {
        b->next = loop->spare;
        loop->spare = b;
        loop->n_spare++;
    } else {
        llmcbi_free(&loop->alloc, b, b->size);
    }
}

static void llmcbi_run_drop_first(llmcbi_run *run)
{
    llmcbi_block *b = run->first;

    run->first = b->next;
    run->held -= b->size;
    if (!run->first) {
        run->last = NULL;
        run->tail = run->tail_end = NULL;
    }
    llmcbi_block_put(run->loop, b);
}

#define LLMCBI_ALIGN8(n) (((n) + 7) & ~(size_t)7)
#define LLMCBI_BLOCK_HEAD LLMCBI_ALIGN8(sizeof(llmcbi_block))

/* Room for a record with a payload of at most `size` bytes, which begins
 * where the returned pointer says. Nothing is appended before the commit.
 * NULL: no memory. */
static char *llmcbi_run_reserve(llmcbi_run *run, size_t size)
{
    size_t need = LLMCBI_ALIGN8(sizeof(llmcbi_record) + size);

    if ((size_t)(run->tail_end - run->tail) < need) {
        size_t all = LLMCBI_BLOCK_HEAD + need + sizeof(llmcbi_jump);
        llmcbi_block *b;
        llmcbi_jump *jump;
        if (need > UINT32_MAX) return NULL;
        b = llmcbi_block_get(run->loop, all);
        if (!b) return NULL;
        b->first_seq = run->head + 1;
        jump = run->last ? (llmcbi_jump *)(void *)run->tail : &run->anchor;
        jump->head.kind = LLMCBI_JUMP;
        jump->to = (char *)b + LLMCBI_BLOCK_HEAD;
        if (run->last) run->last->next = b;
        else run->first = b;
        run->last = b;
        run->held += b->size;
        run->tail = (char *)b + LLMCBI_BLOCK_HEAD;
        run->tail_end = (char *)b + b->size - sizeof(llmcbi_jump);
    }
    return run->tail + sizeof(llmcbi_record);
}

static void llmcbi_run_commit(llmcbi_run *run, llmcb_event_kind kind,
                              size_t size)
{
    llmcbi_record *rec = (llmcbi_record *)(void *)run->tail;

    rec->kind = (uint32_t)kind;
    rec->size = (uint32_t)LLMCBI_ALIGN8(sizeof *rec + size);
    run->tail += rec->size;
    run->head++;
    llmcbi_make_ready(run->loop, &run->ready);
}

/* The record that a position shows, past any jump. */
static const llmcbi_record *llmcbi_record_at(const char **pos)
{
    const llmcbi_record *rec = (const llmcbi_record *)(const void *)*pos;

    while (rec->kind == LLMCBI_JUMP) {
        *pos = ((const llmcbi_jump *)(const void *)rec)->to;
        rec = (const llmcbi_record *)(const void *)*pos;
    }
    return rec;
}

/* A string behind the fixed part of a payload. */
static llmcb_str llmcbi_record_text(char **at, const char *s, size_t len)
{
    llmcb_str r = llmcbi_slice(*at, len);

    if (len) memcpy(*at, s, len);
    (*at)[len] = '\0';
    *at += len + 1;
    return r;
}

static llmcb_code llmcbi_run_data(llmcbi_run *run, llmcb_event_kind kind,
                                  llmcb_str name, llmcb_str text)
{
    size_t size = sizeof(llmcb_data) + name.len + text.len + 2;
    char *at = llmcbi_run_reserve(run, size);
    llmcb_data *data = (llmcb_data *)(void *)at;

    if (!at) return LLMCB_ENOMEM;
    at += sizeof *data;
    data->name = llmcbi_record_text(&at, name.ptr, name.len);
    data->text = llmcbi_record_text(&at, text.ptr, text.len);
    llmcbi_run_commit(run, kind, size);
    return LLMCB_OK;
}

/* ==== [CALL] handlers, cursors, dispatch =============================== */

/* Where one handler stands in one run. It belongs to the loop, or while
 * on_pool to the workers; what they share is under the mutex. */
struct llmcbi_cursor {
    llmcbi_run *run;
    llmcb_handler *handler;
    llmcbi_strand *strand; /* NULL: nothing runs on the pool */
    llmcbi_task *task;     /* NULL: nothing is async */
    llmcb_event ev;        /* what the handler is shown */
    const char *pos;       /* the next record */
    uint64_t done;         /* events it is done with */
    uint64_t known;        /* the loop's copy of done */
    uint64_t told_limit, told_mark; /* what was published last */
    llmcbi_cursor *next_unpublished;
    bool unpublished;
    bool on_pool;
    bool running; /* its coroutine has begun and not ended */
    bool mute;    /* has not seen the start, or is given up */

    /* Under the mutex. */
    llmcbi_cursor *next_in_strand, *next_progress;
    uint64_t limit; /* events it may run */
    uint64_t mark;
    uint64_t finish_seq;
    bool busy;     /* in its strand's list or being run */
    bool in_progress;
    int failed;    /* what the handler returned */
};

typedef enum llmcbi_lane {
    LLMCBI_LANE_NONE,
    LLMCBI_LANE_INLINE,
    LLMCBI_LANE_ASYNC,
    LLMCBI_LANE_POOL
} llmcbi_lane;

#define LLMCBI_PICK(table, kind)                                    \
    switch (kind) {                                                 \
    case LLMCB_LLM_START: return (table).on_llm_start;              \
    case LLMCB_CHAT_MODEL_START: return (table).on_chat_model_start; \
    case LLMCB_LLM_NEW_TOKEN: return (table).on_llm_new_token;      \
    case LLMCB_LLM_END: return (table).on_llm_end;                  \
    case LLMCB_LLM_ERROR: return (table).on_llm_error;              \
    case LLMCB_CHAIN_START: return (table).on_chain_start;          \
    case LLMCB_CHAIN_END: return (table).on_chain_end;              \
    case LLMCB_CHAIN_ERROR: return (table).on_chain_error;          \
    case LLMCB_AGENT_ACTION: return (table).on_agent_action;        \
    case LLMCB_AGENT_FINISH: return (table).on_agent_finish;        \
    case LLMCB_TOOL_START: return (table).on_tool_start;            \
    case LLMCB_TOOL_END: return (table).on_tool_end;                \
    case LLMCB_TOOL_ERROR: return (table).on_tool_error;            \
    case LLMCB_RETRIEVER_START: return (table).on_retriever_start;  \
    case LLMCB_RETRIEVER_END: return (table).on_retriever_end;      \
    case LLMCB_RETRIEVER_ERROR: return (table).on_retriever_error;  \
    case LLMCB_TEXT: return (table).on_text;                        \
    case LLMCB_RETRY: return (table).on_retry;                      \
    case LLMCB_CUSTOM_EVENT: return (table).on_custom_event;        \
    case LLMCB_N_EVENTS:                                            \
    default: return NULL;                                           \
    }

static llmcb_sync_fn llmcbi_sync_fn(const llmcb_handler *h,
                                    llmcb_event_kind kind)
{
    LLMCBI_PICK(h->sync, kind)
}

static llmcb_async_fn llmcbi_async_fn(const llmcb_handler *h,
                                      llmcb_event_kind kind)
{
    LLMCBI_PICK(h->async, kind)
}
#undef LLMCBI_PICK

static bool llmcbi_skips(const llmcb_handler *h, llmcb_event_kind kind)
{
    static const uint8_t masks[] = {
        LLMCB_SKIP_LLM,   LLMCB_SKIP_LLM,       LLMCB_SKIP_LLM,
        LLMCB_SKIP_LLM,   LLMCB_SKIP_LLM,       LLMCB_SKIP_CHAIN,
        LLMCB_SKIP_CHAIN, LLMCB_SKIP_CHAIN,     LLMCB_SKIP_AGENT,
        LLMCB_SKIP_AGENT, LLMCB_SKIP_AGENT,     LLMCB_SKIP_AGENT,
        LLMCB_SKIP_AGENT, LLMCB_SKIP_RETRIEVER, LLMCB_SKIP_RETRIEVER,
        LLMCB_SKIP_RETRIEVER, 0,                LLMCB_SKIP_RETRY,
        LLMCB_SKIP_CUSTOM
    };

    return (h->skip & masks[kind]) != 0;
}

static bool llmcbi_handles_chat_start(const llmcb_handler *h)
{
    return h->sync.on_chat_model_start || h->async.on_chat_model_start;
}

static llmcbi_lane llmcbi_lane_of(const llmcbi_cursor *c,
                                  llmcb_event_kind kind)
{
    const llmcb_handler *h = c->handler;

    if (llmcbi_skips(h, kind)) return LLMCBI_LANE_NONE;
    if (c->task && llmcbi_async_fn(h, kind)) return LLMCBI_LANE_ASYNC;
    if (!llmcbi_sync_fn(h, kind)) return LLMCBI_LANE_NONE;
    return c->strand ? LLMCBI_LANE_POOL : LLMCBI_LANE_INLINE;
}

/* Fills c->ev with the event behind `done`, which must exist, and moves pos
 * behind it. */
static void llmcbi_cursor_load(llmcbi_cursor *c, const char **pos,
                               uint64_t done, uint64_t finish_seq)
{
    const llmcbi_run *run = c->run;
    llmcb_event *ev = &c->ev;
    const llmcbi_record *rec = NULL;
    const void *payload;
    llmcb_event_kind kind, before = ev->kind;

    ev->seq = done + 1;
    if (done == 0) {
        kind = llmcbi_handles_chat_start(c->handler) ? LLMCB_CHAT_MODEL_START
                                                     : LLMCB_LLM_START;
        ev->start = run->start;
        ev->kind = kind;
        return;
    }
    if (done + 1 == finish_seq) {
        kind = run->finish_kind;
    } else {
        rec = llmcbi_record_at(pos);
        kind = (llmcb_event_kind)rec->kind;
    }
    if (kind != before) {
        ev->kind = kind;
        ev->start = NULL;
        ev->token = NULL;
        ev->retry = NULL;
        ev->data = NULL;
    }
    if (!rec) {
        ev->result = run->result;
        ev->error = run->error->code == LLMCB_OK ? NULL : run->error;
        return;
    }
    payload = rec + 1;
    if (kind == LLMCB_LLM_NEW_TOKEN)
        ev->token = (const llmcb_chunk *)payload;
    else if (kind == LLMCB_RETRY)
        ev->retry = (const llmcb_retry *)payload;
    else
        ev->data = (const llmcb_data *)payload;
    *pos += rec->size;
}

/* -- workers */

#define LLMCBI_STRAND_BATCH 8

/* Under the mutex. */
static void llmcbi_strand_add(llmcb_loop *loop, llmcbi_cursor *c, bool urgent)
{
    llmcbi_pool *p = loop->pool;
    llmcbi_strand *s = c->strand;

    if (urgent) {
        c->next_in_strand = s->first;
        s->first = c;
        if (!c->next_in_strand) s->last = &c->next_in_strand;
    } else {
        c->next_in_strand = NULL;
        *s->last = c;
        s->last = &c->next_in_strand;
    }
    if (s->queued) return;
    s->queued = true;
    if (urgent) {
        s->next = p->strands;
        p->strands = s;
        if (!s->next) p->last_strand = &s->next;
    } else {
        s->next = NULL;
        *p->last_strand = s;
        p->last_strand = &s->next;
    }
}

static void llmcbi_strand_run(llmcb_loop *loop, llmcbi_strand *s)
{
    llmcbi_cursor *c = s->first;
    uint64_t done = c->done, finish_seq = c->finish_seq;
    uint64_t stop = c->limit;
    const char *pos = c->pos;
    bool handed_back = false;
    int failed = 0;

    s->first = c->next_in_strand;
    if (!s->first) s->last = &s->first;
    if (stop > done + LLMCBI_STRAND_BATCH) stop = done + LLMCBI_STRAND_BATCH;
    llmcbi_unlock(loop);
    while (done < stop && !failed) {
        const char *next = pos;
        llmcbi_lane lane;
        llmcbi_cursor_load(c, &next, done, finish_seq);
        lane = llmcbi_lane_of(c, c->ev.kind);
        if (lane == LLMCBI_LANE_ASYNC) {
            handed_back = true;
            break;
        }
        if (lane == LLMCBI_LANE_POOL)
            failed = llmcbi_sync_fn(c->handler, c->ev.kind)(c->handler,
                                                            &c->ev);
        pos = next;
        done++;
    }
    llmcbi_lock(loop);
    c->done = done;
    c->pos = pos;
    c->failed = failed;
    c->busy = !failed && !handed_back && done < c->limit;
    if (c->busy) llmcbi_strand_add(loop, c, false);
    s->queued = false;
    if (s->first) {
        llmcbi_pool *p = loop->pool;
        s->queued = true;
        s->next = NULL;
        *p->last_strand = s;
        p->last_strand = &s->next;
    }
    if (!c->in_progress) {
        c->in_progress = true;
        c->next_progress = loop->progress;
        loop->progress = c;
    }
    if (failed || handed_back || done >= c->mark || (!c->busy && !c->limit)) {
        loop->progress_due = true;
        llmcbi_wake_sleeper(loop);
    }
}

/* Tells the workers of new events, in one go. */
static void llmcbi_publish(llmcb_loop *loop)
{
    llmcbi_cursor *c = loop->unpublished;
    llmcbi_pool *p = loop->pool;
    bool strand;

    if (!c) return;
    loop->unpublished = NULL;
    llmcbi_lock(loop);
    for (; c; c = c->next_unpublished) {
        llmcbi_run *run = c->run;
        c->unpublished = false;
        c->told_limit = run->head;
        c->told_mark = run->mark;
        c->mark = run->mark;
        c->finish_seq = run->finish_seq;
        c->limit = c->mute || (run->skipping && !run->finish_seq)
                       ? 0
                       : run->head;
        if (c->busy || c->failed) continue;
        if (c->done < c->limit) {
            c->busy = true;
            llmcbi_strand_add(loop, c,
                              c->done == 0 || c->done + 1 == c->finish_seq);
        } else if (!c->in_progress) { /* nothing to do: give it back */
            c->in_progress = true;
            c->next_progress = loop->progress;
            loop->progress = c;
            loop->progress_due = true;
        }
    }
    if (p && p->n_idle && llmcbi_pool_has_work(p, &strand))
        pthread_cond_signal(&p->cond);
    llmcbi_unlock(loop);
}

/* -- the pump */

static void llmcbi_cursor_failed(llmcbi_cursor *c, llmcb_event_kind kind,
                                 int result)
{
    llmcbi_run *run = c->run;
    char line[200], digits[24];
    const char *parts[6];
    size_t i, used = 0;

    if (c->handler->flags & LLMCB_RAISE) {
        if (!run->raised_by) {
            run->raised_by = c->handler;
            run->raised_result = result;
            run->raised_in = kind;
        }
        return;
    }
    parts[0] = "handler ";
    parts[1] = c->handler->name ? c->handler->name : "(no name)";
    parts[2] = " failed in ";
    parts[3] = llmcb_event_name(kind);
    parts[4] = " with ";
    parts[5] = llmcbi_decimal(digits, result);
    for (i = 0; i < 6; i++) {
        llmcbi_copy_clean(line + used, sizeof line - used, parts[i],
                          strlen(parts[i]));
        used += strlen(line + used);
    }
    llmcbi_log(run->loop, line);
}

static void llmcbi_cursor_step_done(llmcbi_cursor *c, int result)
{
    c->known = ++c->done;
    if (result) llmcbi_cursor_failed(c, c->ev.kind, result);
}

static llmcb_step llmcbi_cursor_task_step(llmcbi_task *t)
{
    llmcbi_cursor *c = (llmcbi_cursor *)t->owner;

    return llmcbi_async_fn(c->handler, c->ev.kind)(&t->pub, c->handler,
                                                   &c->ev);
}

static void llmcbi_cursor_task_finish(llmcbi_task *t, llmcb_code code)
{
    llmcbi_cursor *c = (llmcbi_cursor *)t->owner;

    c->running = false;
    /* a coroutine that was cancelled and says so has not failed */
    if (code == LLMCB_ECANCELLED && c->run->skipping) code = LLMCB_OK;
    llmcbi_cursor_step_done(c, code);
    llmcbi_make_ready(c->run->loop, &c->run->ready);
}

static void llmcbi_cursor_start_task(llmcbi_cursor *c)
{
    llmcbi_task *t = c->task;

    t->pub.at = 0;
    t->pub.result = LLMCB_OK;
    t->cancelled = false;
    if (c->handler->frame_size)
        memset(t->pub.frame, 0, c->handler->frame_size);
    c->running = true;
    llmcbi_task_run(&t->ready);
}

static void llmcbi_cursor_unpublish(llmcbi_cursor *c)
{
    if (c->unpublished) return;
    c->unpublished = true;
    c->next_unpublished = c->run->loop->unpublished;
    c->run->loop->unpublished = c;
}

/* One event, if there is one and the handler is free. false: it has to
 * wait, for news or for itself. */
static bool llmcbi_cursor_advance(llmcbi_cursor *c)
{
    llmcbi_run *run = c->run;
    const char *next = c->pos;

    if (c->on_pool || c->running || c->done >= run->head) return false;
    if (run->skipping && c->done + 1 != run->finish_seq) {
        uint64_t to = run->finish_seq ? run->finish_seq - 1 : run->head;
        if (c->done == 0) c->mute = true;
        c->ev.skipped += to - c->done;
        c->done = c->known = to;
        return true;
    }
    llmcbi_cursor_load(c, &next, c->done, run->finish_seq);
    switch (c->mute ? LLMCBI_LANE_NONE : llmcbi_lane_of(c, c->ev.kind)) {
    case LLMCBI_LANE_INLINE:
        c->pos = next;
        llmcbi_cursor_step_done(
            c, llmcbi_sync_fn(c->handler, c->ev.kind)(c->handler, &c->ev));
        return true;
    case LLMCBI_LANE_ASYNC:
        c->pos = next;
        llmcbi_cursor_start_task(c);
        return !c->running;
    case LLMCBI_LANE_POOL:
        c->on_pool = true;
        c->told_limit = 0;
        return false;
    case LLMCBI_LANE_NONE:
    default:
        c->pos = next;
        c->known = ++c->done;
        return true;
    }
}

/* The events that every cursor is done with, as far as the loop knows. */
static uint64_t llmcbi_run_slowest(const llmcbi_run *run)
{
    uint64_t least = run->head;
    size_t i;

    for (i = 0; i < run->n_cursors; i++)
        if (!run->cursors[i].mute && run->cursors[i].known < least)
            least = run->cursors[i].known;
    return least;
}

/* Whether no worker can be inside the run's memory. */
static bool llmcbi_run_off_pool(const llmcbi_run *run)
{
    size_t i;

    for (i = 0; i < run->n_cursors; i++)
        if (run->cursors[i].on_pool) return false;
    return true;
}

static void llmcbi_run_recycle(llmcbi_run *run)
{
    uint64_t past = run->slowest;
    size_t i;

    if (run->has_pull && run->pull < past) past = run->pull;
    for (i = 0; i < run->n_cursors; i++) /* mute ones still hold a place */
        if (run->cursors[i].known < past) past = run->cursors[i].known;
    while (run->first && run->first->next &&
           past >= run->first->next->first_seq)
        llmcbi_run_drop_first(run);
    if (run->first && past >= run->head && llmcbi_run_off_pool(run)) {
        while (run->first) llmcbi_run_drop_first(run);
        for (i = 0; i < run->n_cursors; i++)
            run->cursors[i].pos = (const char *)&run->anchor;
        run->pull_pos = (const char *)&run->anchor;
    }
}

/* What the loop must be woken for. */
static void llmcbi_run_set_mark(llmcbi_run *run)
{
    if (run->state != LLMCBI_RUN_OPEN || (run->starved && run->lockstep))
        run->mark = run->head;
    else if (run->starved)
        run->mark = run->head > run->window_events / 2
                        ? run->head - run->window_events / 2
                        : 0;
    else
        run->mark = UINT64_MAX;
}

/* Whether the next event may be appended. The window is counted from the
 * slowest cursor; an empty log takes anything. */
static bool llmcbi_run_has_room(llmcbi_run *run)
{
    uint64_t from = run->slowest;
    size_t i;

    if (run->has_pull && run->pull < from) from = run->pull;
    if (run->lockstep)
        for (i = 0; i < run->n_cursors; i++)
            if (run->cursors[i].handler->flags & LLMCB_AWAIT_EACH &&
                !run->cursors[i].mute && run->cursors[i].known < run->head)
                return false;
    return run->head - from < run->window_events &&
           (run->held <= run->window_bytes || from == run->head);
}

/* A handler takes longer than it may, and the run waits for it. */
static void llmcbi_run_watch_patience(llmcbi_run *run, uint64_t before)
{
    bool waiting = run->slowest < run->head &&
                   (run->state != LLMCBI_RUN_OPEN || run->starved);

    if (run->handler_ms <= 0) return;
    if (!waiting)
        llmcbi_timer_stop(run->loop, &run->patience);
    else if (!run->patience.place || run->slowest != before)
        llmcbi_timer_start(run->loop, &run->patience, run->handler_ms);
}

/* Gives every handler what it can take, then tells the owner if something
 * that it waits for has come. */
static void llmcbi_run_pump(llmcbi_ready *r)
{
    llmcbi_run *run = (llmcbi_run *)(void *)((char *)r -
                                             offsetof(llmcbi_run, ready));
    uint64_t before = run->slowest;
    size_t i;
    bool moved = true;

    while (moved) { /* inline handlers, event by event */
        moved = false;
        for (i = 0; i < run->n_cursors; i++)
            if (run->cursors[i].handler->flags & LLMCB_INLINE)
                moved |= llmcbi_cursor_advance(&run->cursors[i]);
    }
    for (i = 0; i < run->n_cursors; i++)
        while (llmcbi_cursor_advance(&run->cursors[i])) continue;
    run->slowest = llmcbi_run_slowest(run);
    llmcbi_run_recycle(run);
    run->told(run);
    llmcbi_run_set_mark(run);
    for (i = 0; i < run->n_cursors; i++) {
        llmcbi_cursor *c = &run->cursors[i];
        if (c->on_pool &&
            (c->told_limit != run->head || c->told_mark != run->mark))
            llmcbi_cursor_unpublish(c);
    }
    llmcbi_run_watch_patience(run, before);
}

/* What workers have done since the last turn. */
static void llmcbi_take_progress(llmcb_loop *loop, llmcbi_cursor *list)
{
    llmcbi_cursor *c, *next;

    if (!list) return;
    llmcbi_lock(loop);
    for (c = list; c; c = c->next_progress) {
        c->in_progress = false;
        c->known = c->done;
        c->on_pool = c->busy;
    }
    llmcbi_unlock(loop);
    for (c = list; c; c = next) {
        next = c->next_progress;
        if (!c->on_pool && c->failed) {
            int failed = c->failed;
            c->failed = 0;
            llmcbi_cursor_failed(c, c->ev.kind, failed);
        }
        llmcbi_make_ready(loop, &c->run->ready);
    }
}

/* -- the life of a run, for its owner */

static llmcb_code llmcbi_check_handler(const llmcb_handler *h)
{
    int kind;

    if (!h) return LLMCB_EINVAL;
    for (kind = 0; kind < LLMCB_N_EVENTS; kind++)
        if (llmcbi_sync_fn(h, (llmcb_event_kind)kind) &&
            llmcbi_async_fn(h, (llmcb_event_kind)kind))
            return LLMCB_EINVAL;
    return LLMCB_OK;
}

static bool llmcbi_any_async(const llmcb_handler *h)
{
    int kind;

    for (kind = 0; kind < LLMCB_N_EVENTS; kind++)
        if (llmcbi_async_fn(h, (llmcb_event_kind)kind)) return true;
    return false;
}

static bool llmcbi_any_sync(const llmcb_handler *h)
{
    int kind;

    for (kind = 0; kind < LLMCB_N_EVENTS; kind++)
        if (llmcbi_sync_fn(h, (llmcb_event_kind)kind)) return true;
    return false;
}

static llmcbi_strand *llmcbi_strand_get(llmcb_loop *loop,
                                        const llmcb_handler *h)
{
    llmcbi_pool *p = loop->pool;
    llmcbi_strand *s;

    if (!(h->flags & LLMCB_PARALLEL))
        for (s = p->known; s; s = s->next_known)
            if (s->handler == h) {
                s->users++;
                return s;
            }
    s = (llmcbi_strand *)llmcbi_alloc(&loop->alloc, sizeof *s);
    if (!s) return NULL;
    s->last = &s->first;
    s->users = 1;
    if (h->flags & LLMCB_PARALLEL) return s;
    s->handler = h;
    s->next_known = p->known;
    p->known = s;
    return s;
}

static void llmcbi_strand_put(llmcb_loop *loop, llmcbi_strand *s)
{
    llmcbi_strand **at = &loop->pool->known;

    if (--s->users) return;
    while (*at && *at != s) at = &(*at)->next_known;
    if (*at) *at = s->next_known;
    llmcbi_free(&loop->alloc, s, sizeof *s);
}

static size_t llmcbi_cursor_task_size(const llmcb_handler *h)
{
    return LLMCBI_ALIGN(sizeof(llmcbi_task)) + h->frame_size;
}

static void llmcbi_cursor_free(llmcb_loop *loop, llmcbi_cursor *c)
{
    if (c->strand) llmcbi_strand_put(loop, c->strand);
    if (c->task) {
        llmcbi_unready(&c->task->ready);
        if (c->task->loop) llmcbi_task_disarm(c->task);
        llmcbi_timer_free(loop, &c->task->timer);
        llmcbi_free(&loop->alloc, c->task,
                    llmcbi_cursor_task_size(c->handler));
    }
}

static void llmcbi_run_free(llmcbi_run *run)
{
    llmcb_loop *loop = run->loop;
    llmcbi_cursor **at = &loop->unpublished;
    size_t i;

    if (!loop) return; /* never begun */
    while (*at) {
        if ((*at)->run == run) *at = (*at)->next_unpublished;
        else at = &(*at)->next_unpublished;
    }
    while (run->first) llmcbi_run_drop_first(run);
    for (i = 0; i < run->n_cursors; i++)
        llmcbi_cursor_free(loop, &run->cursors[i]);
    llmcbi_free(&loop->alloc, run->cursors,
                run->n_cursors * sizeof *run->cursors);
    llmcbi_unready(&run->ready);
    llmcbi_timer_free(loop, &run->patience);
    run->loop = NULL;
}

static llmcb_code llmcbi_cursor_init(llmcbi_run *run, llmcbi_cursor *c,
                                     llmcb_handler *h, const void *home)
{
    llmcb_loop *loop = run->loop;

    c->run = run;
    c->handler = h;
    c->pos = (const char *)&run->anchor;
    c->ev.run = &run->pub;
    if (llmcbi_any_async(h)) {
        llmcbi_task *t;
        if (h->frame_size > SIZE_MAX / 4) return LLMCB_EINVAL;
        t = (llmcbi_task *)llmcbi_alloc(&loop->alloc,
                                        llmcbi_cursor_task_size(h));
        if (!t) return LLMCB_ENOMEM;
        c->task = t;
        t->step = llmcbi_cursor_task_step;
        t->finish = llmcbi_cursor_task_finish;
        t->home = home;
        t->owner = c;
        t->pub.self = h->user;
        t->pub.frame = (char *)t + LLMCBI_ALIGN(sizeof *t);
        if (!llmcbi_task_init(loop, t)) return LLMCB_ENOMEM;
    }
    if (llmcbi_any_sync(h) && !(h->flags & LLMCB_INLINE)) {
        llmcb_code code = llmcbi_pool_start(loop, NULL);
        if (code != LLMCB_OK) return code;
        c->strand = llmcbi_strand_get(loop, h);
        if (!c->strand) return LLMCB_ENOMEM;
    }
    if (h->flags & LLMCB_AWAIT_EACH) run->lockstep = true;
    return LLMCB_OK;
}

static void llmcbi_run_impatient(llmcbi_timer *t);

/* Everything that the run can need until its finish is reserved here. */
static llmcb_code llmcbi_run_init(llmcb_loop *loop, llmcbi_run *run,
                                  llmcb_handler *const *handlers, size_t n,
                                  const void *home)
{
    llmcb_code code = LLMCB_OK;
    size_t i;

    run->loop = loop;
    run->ready.fn = llmcbi_run_pump;
    run->mark = UINT64_MAX;
    run->pull_pos = (const char *)&run->anchor;
    if (run->handler_ms > 0 &&
        !llmcbi_timer_init(loop, &run->patience, llmcbi_run_impatient))
        return LLMCB_ENOMEM;
    if (!n) return LLMCB_OK;
    run->cursors = (llmcbi_cursor *)llmcbi_alloc(&loop->alloc,
                                                 n * sizeof *run->cursors);
    if (!run->cursors) return LLMCB_ENOMEM;
    run->n_cursors = n;
    for (i = 0; i < n; i++) run->cursors[i].handler = handlers[i];
    for (i = 0; i < n && code == LLMCB_OK; i++)
        code = llmcbi_cursor_init(run, &run->cursors[i], handlers[i], home);
    return code;
}

static void llmcbi_run_begin(llmcbi_run *run, const llmcb_start *start)
{
    llmcbi_run_set_state(run, LLMCBI_RUN_STARTING);
    run->start = start;
    run->head = 1;
    run->pull = 1;
    llmcbi_make_ready(run->loop, &run->ready);
}

/* Events handed out already end; the rest is skipped. */
static void llmcbi_run_skip(llmcbi_run *run)
{
    size_t i;

    run->skipping = true;
    for (i = 0; i < run->n_cursors; i++) {
        llmcbi_cursor *c = &run->cursors[i];
        if (c->running) llmcbi_task_cancel(c->task);
        if (c->on_pool) llmcbi_cursor_unpublish(c);
    }
    llmcbi_make_ready(run->loop, &run->ready);
}

/* The outcome is known: no more events but the finish. */
static void llmcbi_run_drain(llmcbi_run *run)
{
    if (run->state >= LLMCBI_RUN_DRAINING) return;
    llmcbi_run_set_state(run, LLMCBI_RUN_DRAINING);
    run->starved = false;
    llmcbi_make_ready(run->loop, &run->ready);
}

static void llmcbi_run_finish(llmcbi_run *run, llmcb_event_kind kind,
                              const llmcb_result *result,
                              const llmcb_error *error)
{
    llmcbi_run_set_state(run, LLMCBI_RUN_FINISHING);
    run->finish_kind = kind;
    run->result = result;
    run->error = error;
    run->finish_seq = ++run->head;
    llmcbi_make_ready(run->loop, &run->ready);
}

/* Whether all handlers are done with all there is. */
static bool llmcbi_run_settled(const llmcbi_run *run)
{
    return run->slowest == run->head;
}

/* Gives up the handlers that the run waits for. */
static void llmcbi_run_abandon(llmcbi_run *run)
{
    size_t i;

    for (i = 0; i < run->n_cursors; i++) {
        llmcbi_cursor *c = &run->cursors[i];
        if (c->known >= run->head) continue;
        c->mute = true;
        if (c->running) llmcbi_task_cancel(c->task);
        if (c->on_pool) llmcbi_cursor_unpublish(c);
    }
    run->abandoned = true;
    llmcbi_make_ready(run->loop, &run->ready);
}

static void llmcbi_run_impatient(llmcbi_timer *t)
{
    llmcbi_run_abandon((llmcbi_run *)(void *)((char *)t -
                                     offsetof(llmcbi_run, patience)));
}

/* -- events of the program */

typedef struct llmcbi_emission {
    llmcbi_run *run;
    llmcb_event_kind kind;
    size_t size;
    llmcb_str name, text;
} llmcbi_emission;

static void llmcbi_emission_arrive(void *arg)
{
    llmcbi_emission *e = (llmcbi_emission *)arg;
    llmcb_loop *loop = e->run->loop;

    if (e->run->state < LLMCBI_RUN_DRAINED && !e->run->skipping &&
        llmcbi_run_data(e->run, e->kind, e->name, e->text) != LLMCB_OK)
        llmcbi_log(loop, "an event of a handler was lost: out of memory");
    llmcbi_free(&loop->alloc, e, e->size);
}

/* From a worker: the event travels as a post. Its run lives at least until
 * the loop has seen that the handler, which is calling, has returned. */
static llmcb_code llmcbi_run_post(llmcbi_run *run, llmcb_event_kind kind,
                                  llmcb_str name, llmcb_str text)
{
    const llmcb_allocator *a = &run->loop->alloc;
    size_t size = sizeof(llmcbi_emission) + name.len + text.len + 2;
    llmcbi_emission *e = (llmcbi_emission *)llmcbi_alloc(a, size);
    char *at = (char *)(e + 1);
    llmcb_code code;

    if (!e) return LLMCB_ENOMEM;
    e->run = run;
    e->kind = kind;
    e->size = size;
    e->name = llmcbi_record_text(&at, name.ptr, name.len);
    e->text = llmcbi_record_text(&at, text.ptr, text.len);
    code = llmcb_loop_post(run->loop, llmcbi_emission_arrive, e);
    if (code != LLMCB_OK) llmcbi_free(a, e, size);
    return code;
}

static llmcb_code llmcbi_run_emit(llmcb_run *pub, llmcb_event_kind kind,
                                  llmcb_str name, llmcb_str text)
{
    llmcbi_run *run = (llmcbi_run *)(void *)pub;
    llmcb_code code;

    if (!run || !run->loop) return run ? LLMCB_ESTATE : LLMCB_ENOMEM;
    if (!text.ptr) text = llmcbi_slice("", 0);
    if (text.len > SIZE_MAX / 4) return LLMCB_EINVAL;
    code = llmcbi_enter(run->loop);
    if (code == LLMCB_ESTATE) return llmcbi_run_post(run, kind, name, text);
    if (code != LLMCB_OK) return code;
    if (run->state == LLMCBI_RUN_NEW || run->state >= LLMCBI_RUN_DRAINED ||
        run->skipping)
        return LLMCB_ESTATE;
    if (!llmcbi_run_has_room(run)) return LLMCB_EBUSY;
    return llmcbi_run_data(run, kind, name, text);
}

LLMCBI_DEF llmcb_code llmcb_run_text(llmcb_run *run, llmcb_str text)
{
    return llmcbi_run_emit(run, LLMCB_TEXT, llmcbi_slice("", 0), text);
}

LLMCBI_DEF llmcb_code llmcb_run_custom(llmcb_run *run, const char *name,
                                       llmcb_str data)
{
    if (!name || !*name) return LLMCB_EINVAL;
    return llmcbi_run_emit(run, LLMCB_CUSTOM_EVENT, llmcbi_str(name), data);
}

/* -- the end of a loop */

static void llmcbi_cancel_all(llmcb_loop *loop)
{
    llmcb_op *op, *next;

    for (op = loop->ops; op; op = next) {
        next = op->next;
        if (!op->done) op->cls->cancel(op, LLMCB_DETAIL_LOOP);
    }
}

/* Waits for the workers to leave. false: one is stuck. */
static bool llmcbi_pool_join(llmcb_loop *loop, int64_t deadline)
{
    llmcbi_pool *p = loop->pool;
    unsigned i, exited;

    if (!p) return true;
    llmcbi_lock(loop);
    p->stop = true;
    pthread_cond_broadcast(&p->cond);
    for (;;) {
        struct pollfd fd;
        int64_t ms = deadline - llmcbi_clock_ms();
        exited = p->n_exited;
        if (exited == p->n_threads || ms <= 0) break;
        llmcbi_unlock(loop);
        fd.fd = loop->wake_fd[0];
        fd.events = POLLIN;
        LLMCBI_SYS(poll)(&fd, 1, (int)(ms < INT_MAX ? ms : INT_MAX));
        llmcbi_drain_wakeups(loop);
        llmcbi_lock(loop);
    }
    llmcbi_unlock(loop);
    for (i = 0; i < p->n_threads; i++) {
        if (exited == p->n_threads) pthread_join(p->threads[i], NULL);
        else pthread_detach(p->threads[i]);
    }
    return exited == p->n_threads;
}

/* Everything, or all that a stuck thread does not use. */
static void llmcbi_loop_release(llmcb_loop *loop, bool stuck)
{
    llmcb_allocator a = loop->alloc;

    while (loop->transports) {
        llmcb_transport *tr = loop->transports;
        loop->transports = tr->next;
        if (tr->free) tr->free(tr);
    }
    while (loop->ops) {
        loop->ops->done = true;
        llmcbi_op_destroy(loop->ops);
    }
    while (loop->spare) {
        llmcbi_block *b = loop->spare;
        loop->spare = b->next;
        llmcbi_free(&a, b, b->size);
    }
    llmcbi_poller_close(loop);
    llmcbi_free(&a, loop->heap, loop->heap_cap * sizeof *loop->heap);
    llmcbi_free(&a, loop->watches, loop->watches_cap * sizeof *loop->watches);
    llmcbi_free(&a, loop->scratch, LLMCBI_SCRATCH);
    if (stuck) return;
    if (loop->pool) {
        pthread_cond_destroy(&loop->pool->cond);
        llmcbi_free(&a, loop->pool, sizeof *loop->pool);
    }
    pthread_mutex_destroy(&loop->mutex);
    LLMCBI_SYS(close)(loop->wake_fd[0]);
    LLMCBI_SYS(close)(loop->wake_fd[1]);
    llmcbi_free(&a, loop, sizeof *loop);
}

LLMCBI_DEF llmcb_code llmcb_loop_free(llmcb_loop *loop)
{
    int64_t deadline;
    bool late = false, stuck;

    if (!loop) return LLMCB_OK;
    if (loop->pid != getpid()) {
        /* the threads stayed in the parent; the memory is a copy */
        LLMCBI_SYS(close)(loop->wake_fd[0]);
        LLMCBI_SYS(close)(loop->wake_fd[1]);
        if (loop->epoll_fd >= 0) LLMCBI_SYS(close)(loop->epoll_fd);
        return LLMCB_EFORK;
    }
    if (llmcbi_may_turn(loop) != LLMCB_OK) return LLMCB_ESTATE;
    llmcb_loop_set_host(loop, NULL);
    deadline = llmcbi_clock_ms() + loop->shutdown_ms;
    loop->freeing = true;
    while (loop->n_alive && !late) {
        int64_t left = deadline - llmcbi_clock_ms();
        llmcbi_cancel_all(loop);
        if (left > 0) llmcbi_turn(loop, left);
        else late = true;
    }
    /* threads that are idle leave at once, but not in no time */
    stuck = !llmcbi_pool_join(loop, late ? deadline + 200 : deadline);
    if (!stuck) llmcbi_turn(loop, 0); /* what workers left behind */
    llmcbi_loop_release(loop, stuck);
    return late || stuck ? LLMCB_ETIMEDOUT : LLMCB_OK;
}
