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
 *   [AGENT]  runs of the program, tools, the agent loop
 *   [KIT]    ready-made handlers: tokens, tree, trace, usage, timing ...
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
 *      the window is full, as long as the pool has a thread for the others
 *      (llmcb_loop_desc.workers). LLMCB_AWAIT_EACH asks for LangChain's lock
 *      step instead: the run's next event waits for that handler.
 *   4. Bounded and lossless. A run holds at most a window of undelivered
 *      events and bytes; at the window the transport is paused. Success,
 *      server faults, transport faults and timeouts deliver everything that
 *      came before them. Only cancel and freeing the loop skip what no
 *      handler was given yet, and the error event counts what was skipped.
 *   5. Safe by default. Over all runs of a loop the sync functions of a
 *      handler are never entered by two threads at once. LLMCB_PARALLEL
 *      lifts that across runs, never within one. Async functions run on the
 *      loop's thread, beside the sync ones of other runs if a handler has
 *      both. A handler shared by two loops must be thread-safe.
 *   6. Exactly one finish for every run that started: also on cancel,
 *      timeout, a raising handler, no memory, or the loop being freed. Only
 *      a handler that never returns keeps it from the others, if there is
 *      no handler_ms and llmcb_loop_free gives up on it. A handler that took
 *      longer than handler_ms is told nothing more of that run.
 *   7. No allocation a token in steady state.
 *
 * RULES
 *
 *   Threads    A loop and all that belongs to it is used by one thread.
 *              From any thread: llmcb_loop_post, llmcb_loop_wakeup,
 *              llmcb_op_cancel (the last two also from a signal handler),
 *              llmcb_run_text and llmcb_run_custom inside a sync handler.
 *   Callbacks  Cancel and free are legal inside every callback on the loop's
 *              thread; what is in use is destroyed later. A sync handler on
 *              the pool may cancel, but not free. Running or freeing the loop
 *              inside a callback returns LLMCB_ESTATE. Callbacks must not
 *              throw or longjmp. A start function never calls back before it
 *              returns, but for the functions of a llmcb_host.
 *   Memory     Descriptors are read during the call and their strings are
 *              copied. Handlers are the caller's structs and must outlive
 *              the runs that use them; after llmcb_op_free of a live
 *              operation, or of one that gave up on a handler (handler_ms),
 *              until llmcb_loop_free has returned LLMCB_OK.
 *              Event payloads are valid until the handler is done with that
 *              event: a coroutine until it ends.
 *   Errors     LLMCB_OK is 0, the rest is negative. Every function takes
 *              NULL for an object and then does nothing or says
 *              LLMCB_ENOMEM, so a program may check once, at the end.
 *   Fork       The child of a fork may only free the loop.
 *
 * WRITING HANDLERS
 *
 *   A handler is a struct of yours with functions for the events it cares
 *   for. `sync` functions run on the thread pool and may block; `async` ones
 *   are coroutines on the loop and must not; sync ones flagged LLMCB_INLINE
 *   run on the loop, before the others, and must not block either. Choose
 *
 *     sync    to print, write, call other libraries: the usual choice;
 *             on a stack of worker_stack bytes
 *     inline  to count or copy, for less than a microsecond
 *     async   to wait for something: a timer, a descriptor, another call
 *
 *   Two handlers may have the same functions; `user` tells them apart, and
 *   one struct may serve any number of calls and runs. ev->run says which run
 *   an event is of (id, parent, tags, metadata), ev->seq its place in it.
 *
 *       struct counter { llmcb_handler h; long tokens; };
 *
 *       static int count(llmcb_handler *h, const llmcb_event *ev)
 *       {
 *           ((struct counter *)h)->tokens += ev->token->text.len > 0;
 *           return 0;
 *       }
 *
 *   An async function keeps what must survive an await in t->frame, zeroed
 *   for each event, and its locals do not:
 *
 *       static llmcb_step notify(llmcb_task *t, llmcb_handler *h,
 *                                const llmcb_event *ev)
 *       {
 *           LLMCB_BEGIN(t);
 *           LLMCB_AWAIT(t, llmcb_sleep(t, 300));
 *           show(h->user, ev->error ? ev->error->message : "done");
 *           LLMCB_END(t);
 *       }
 *
 *   A failure (not 0, or a negative code) is logged; with LLMCB_RAISE it
 *   fails the run, once the other handlers are done with what came before.
 *   Callbacks of a config serve a call and all that it calls in turn; local
 *   ones, and those of a chat, serve only its own runs; llmcb_loop_hook
 *   serves all runs of a loop. The same handler is told once, however often
 *   it is named. To see what came, not when: llmcb_chat_stream and
 *   llmcb_op_next need no handler.
 *
 * WHAT IT COSTS
 *
 *   A token costs one copy and one call a handler, and nothing is allocated.
 *   Tokens that come one by one cost what the system takes for reading each
 *   from a socket; a loop of 256 descriptors or more, of which four come in a
 *   millisecond, looks only once in each, if it waits by itself and no less
 *   comes for that. An inline handler is the cheapest: where all of a run's
 *   are, a token is shown in the answer's own memory while it is read. An async
 *   one that does not await costs a copy more, a sync one the hand-over of what
 *   came in one turn: that wakes a worker, or one that has just had work finds
 *   it within two milliseconds. LLMCB_AWAIT_EACH costs a wake-up both ways for
 *   each token, which never waits for that. An open stream on plain sockets
 *   takes 2 KiB and its text, with libcurl several times that; what was asked
 *   is given back when the answer begins. Use plain sockets for http:// and
 *   unix: addresses, libcurl for TLS. Figures, and how they were taken:
 *   tests/bench/README.md.
 *
 * DIFFERENCES FROM LANGCHAIN, each on purpose
 *
 *   - A handler's queue is its own: a slow one does not hold back the answer
 *     until the window is full. LLMCB_AWAIT_EACH is LangChain's way.
 *   - Sync functions of one handler never overlap: most are not thread-safe.
 *   - One skip mask a handler, and skipping LLM events skips the chat start:
 *     an end without its start helps nobody.
 *   - Every run that started finishes once, also if it is cancelled, times
 *     out or is dropped; children before parents. Cancelled tools, chains
 *     and retrievers get an error event.
 *   - An error event has the partial answer; a consumer that leaves early is
 *     LLMCB_DETAIL_CONSUMER, and no failure of the server.
 *   - A raising handler lets the others finish first, and its error does not
 *     hide the one that was there.
 *   - A call of several prompts gives back those that succeeded.
 *   - Retries are told (on_retry). A stream that ends without saying so is an
 *     error, and silence is a timeout, whatever comments the server sends.
 *   - Tool arguments that are cut off are invalid, never repaired; refusals
 *     are kept; finish_reason and model are not doubled; calls with the same
 *     index and other ids are two.
 *   - Usage is asked for, and unknown if the server does not say, not 0.
 *   - A cached answer says so. Usage and model are in the end event of a
 *     stream as of a whole answer.
 *   - Configurations are values, copied at the call: no manager that changes
 *     under way, no context variables. A tag that is local and inherited
 *     stays inherited. Hooks belong to a loop and leave nothing behind.
 *   - An agent that runs into a limit ends in order, but its code says so.
 *     Other tools of a turn are cancelled when one fails the agent.
 *   - Inline is for sync functions; a coroutine is on the loop already.
 *
 * SWITCHES (define them in the file that has LLMCB_IMPLEMENTATION)
 *
 *   LLMCB_STATIC       all functions static; for a program of one file, or
 *                      for several that each have an implementation
 *   LLMCB_API          prefix of every public declaration, e.g. dllexport
 *   LLMCB_ASSERT(x)    check of internal rules; empty unless defined
 *   LLMCB_NO_CURL      no libcurl: plain sockets only, https is an error
 *   LLMCB_NO_SOCKETS   no plain-socket transport
 *   LLMCB_NO_EPOLL     poll(2) on Linux too
 *   LLMCB_NO_AGENT     no [AGENT]; define it wherever included
 *   LLMCB_NO_KIT       no [KIT], [REPLAY], limiter and cache; likewise
 *   LLMCB_NO_STDIO     no llmcb_result_print and llmcb_str_print, no files
 *                      in [REPLAY] and [KIT]; define it wherever included
 *   LLMCB_ALLOW_INSECURE_TLS   makes llmcb_chat_desc.insecure_tls work
 *   LLMCB_MALLOC LLMCB_REALLOC LLMCB_FREE   all three or none
 *
 *   Compiled for size (-Os), shortcuts are left out that only save time: 3 KiB
 *   less, and a token costs 1 us instead of 0.05. Use -O2 for many streams.
 *
 *   With -std=c99 or -std=c11 on glibc the implementation needs POSIX:
 *   include this file first, or compile with -D_POSIX_C_SOURCE=200809L.
 */
#if defined(LLMCB_IMPLEMENTATION) && defined(__STRICT_ANSI__) &&            \
    !defined(_POSIX_C_SOURCE) && !defined(_XOPEN_SOURCE) &&                 \
    !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE) &&                   \
    !defined(__APPLE__) && !defined(__FreeBSD__) && !defined(__NetBSD__) && \
    !defined(__OpenBSD__)
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
    LLMCB_ENOMEM = -1,      /* out of memory */
    LLMCB_EINVAL = -2,      /* a bad argument, refused before anything ran */
    LLMCB_ESTATE = -3,      /* the call is not legal here or now */
    LLMCB_ECANCELLED = -4,  /* cancelled by the program; see detail */
    LLMCB_ETIMEDOUT = -5,   /* a time limit; see detail */
    LLMCB_EDNS = -6,        /* the host's name could not be resolved */
    LLMCB_ECONNECT = -7,    /* no connection to the server */
    LLMCB_ETLS = -8,        /* TLS: handshake or certificate */
    LLMCB_EIO = -9,         /* the connection broke */
    LLMCB_ETRUNCATED = -10, /* the answer ended before it was whole */
    LLMCB_EHTTP = -11,      /* an HTTP status that is no success */
    LLMCB_EAPI = -12,       /* the server reported an error in its answer */
    LLMCB_EPROTO = -13,     /* not valid HTTP, or not this protocol */
    LLMCB_ECTYPE = -14,     /* a content type or encoding not asked for */
    LLMCB_EREDIRECT = -15,  /* a redirect; none is ever followed */
    LLMCB_EJSON = -16,      /* not valid JSON */
    LLMCB_EUTF8 = -17,      /* text of the program that is not UTF-8 */
    LLMCB_ELIMIT = -18,     /* a limit; the message says which */
    LLMCB_EHANDLER = -19,   /* a handler flagged LLMCB_RAISE failed */
    LLMCB_EBUSY = -20,      /* no room now; try again later */
    LLMCB_ESYS = -21,       /* a system call failed; see sys_errno */
    LLMCB_EFORK = -22,      /* the loop belongs to the parent process */
    LLMCB_ETOOL = -23       /* a tool failed, or was called wrongly */
} llmcb_code;

/* What kind of LLMCB_ETIMEDOUT or LLMCB_ECANCELLED it was. */
typedef enum llmcb_detail {
    LLMCB_DETAIL_NONE,
    LLMCB_DETAIL_CONNECT,    /* no connection within connect_ms */
    LLMCB_DETAIL_FIRST_BYTE, /* no answer within first_byte_ms */
    LLMCB_DETAIL_IDLE,       /* no event with data for idle_ms */
    LLMCB_DETAIL_TOTAL,      /* request and answer, with all retries, took
                                longer than total_ms; or a run or a tool than
                                its timeout_ms */
    LLMCB_DETAIL_HANDLER,    /* a handler took longer than handler_ms */
    LLMCB_DETAIL_CALLER,     /* llmcb_op_cancel */
    LLMCB_DETAIL_CONSUMER,   /* llmcb_op_free of a call under way */
    LLMCB_DETAIL_LOOP,       /* llmcb_loop_free */
    LLMCB_DETAIL_PARENT      /* the run that it belonged to ended */
} llmcb_detail;

/* Bytes with their length. Strings that the library hands out also have a
 * NUL behind the last byte, and may hold NUL bytes before it. */
typedef struct llmcb_str {
    const char *ptr;
    size_t len;
} llmcb_str;

/* A C string as such bytes, in place; NULL is empty. Any thread. */
LLMCB_API llmcb_str llmcb_text(const char *s);

/* What went wrong. No member ever holds a key: one that a server repeats in
 * its error is masked. `message` may quote what the server said, which may be
 * any of what it was sent, with control characters replaced. */
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
typedef struct llmcb_run llmcb_run;
typedef struct llmcb_output llmcb_output;
typedef struct llmcb_transport llmcb_transport;
struct pollfd;

/* Zero is the default of every member. */
typedef struct llmcb_loop_desc {
    llmcb_allocator allocator; /* default: LLMCB_REALLOC and LLMCB_FREE */
    unsigned workers;          /* pool threads, 2 to 64; default 4. All but one
                                  may be inside handlers at a time: as many
                                  that are slow hold up all others */
    size_t worker_stack;       /* bytes; default 256 KiB. For sync handlers,
                                  blocking functions and tools */
    bool virtual_clock;        /* time jumps to the next timer in a turn that
                                  finds nothing ready or on the pool, and no
                                  descriptor watched: for recordings, tests */
    int64_t shutdown_ms;       /* how long llmcb_loop_free waits for blocking
                                  functions; default 5000 */
    /* Told of what would else be lost, such as a failing handler: one line,
     * no newline. Loop thread. NULL: nobody is. */
    void (*log)(void *user, const char *line);
    void *log_user;
} llmcb_loop_desc;

/* What a host loop may be asked to watch. */
#define LLMCB_READ 1
#define LLMCB_WRITE 2

/* Push embedding: how a host loop is told what to watch, inside any function
 * that works on the loop. They are callbacks like any other. */
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

/* Runs until no operation is left under way or llmcb_loop_stop was called. A
 * llmcb_chat_stream that nobody reads stays under way at its window. */
LLMCB_API llmcb_code llmcb_loop_run(llmcb_loop *loop);

/* Runs until `op` is done; its result, as llmcb_op_wait. */
LLMCB_API llmcb_code llmcb_loop_run_until(llmcb_loop *loop, llmcb_op *op);

/* One turn: waits at most max_ms (0: not at all, LLMCB_FOREVER: until
 * something happens), then handles what is ready. A virtual clock that has
 * nothing to do jumps, whatever max_ms is. */
LLMCB_API llmcb_code llmcb_loop_run_once(llmcb_loop *loop, int64_t max_ms);

/* Makes llmcb_loop_run and llmcb_op_wait return after the present turn. */
LLMCB_API void llmcb_loop_stop(llmcb_loop *loop);

/* Whether an operation is under way. */
LLMCB_API bool llmcb_loop_alive(const llmcb_loop *loop);

/* Milliseconds on the loop's clock, as of the present turn. Not the time of
 * day; a virtual clock starts at 0. */
LLMCB_API int64_t llmcb_loop_now(const llmcb_loop *loop);

/* Moves a virtual clock forward by ms and makes due what falls in between;
 * it runs in the next turn, or the present one. LLMCB_ESTATE with a real
 * clock. */
LLMCB_API llmcb_code llmcb_clock_advance(llmcb_loop *loop, int64_t ms);

/* Runs fn(arg) on the loop's thread, in its next turn. Any thread. What is
 * still posted when the loop is freed runs then, unless a thread is stuck;
 * what that posts in turn is refused with LLMCB_ESTATE. LLMCB_ENOMEM. */
LLMCB_API llmcb_code llmcb_loop_post(llmcb_loop *loop, void (*fn)(void *arg),
                                     void *arg);

/* Ends the present or next wait of the loop. Any thread, signal-safe. */
LLMCB_API void llmcb_loop_wakeup(llmcb_loop *loop);

/* Pull embedding, three calls around the host's own poll(2):
 *
 *     int64_t ms; size_t n;
 *     llmcb_loop_prepare(loop, &ms);
 *     n = llmcb_loop_pollfds(loop, fds, cap); (more than cap: grow, again)
 *     poll(fds, n, (int)ms);
 *     llmcb_loop_dispatch(loop, fds, n);
 *
 * prepare sets *timeout_ms to how long the host may wait: 0 whenever
 * anything is ready or changed, -1 for no limit. */
LLMCB_API llmcb_code llmcb_loop_prepare(llmcb_loop *loop, int64_t *timeout_ms);

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
LLMCB_API llmcb_code llmcb_loop_fd_event(llmcb_loop *loop, int fd, int events);
LLMCB_API llmcb_code llmcb_loop_timer_event(llmcb_loop *loop);

/* ==== [TASK] operations and coroutines ================================= */

/* An operation is anything under way: a chat call, a coroutine of yours, a
 * blocking function on the pool. The functions below serve them all. */

/* Runs the loop until op is done and returns its code, or LLMCB_EBUSY after
 * llmcb_loop_stop. NULL: LLMCB_ENOMEM. Inside a callback, of what is not done:
 * LLMCB_ESTATE; coroutines use llmcb_await. */
LLMCB_API llmcb_code llmcb_op_wait(llmcb_op *op);

/* Whether op is done. NULL is done. */
LLMCB_API bool llmcb_op_done(const llmcb_op *op);

/* Asks op to end with LLMCB_ECANCELLED in the loop's next turn, up to which
 * its handlers may be told more. What is done stays as it is, and an end that
 * is being told stays the event that it is. A blocking function that runs
 * already is not stopped. Any thread, signal-safe; op must not be freed
 * meanwhile. */
LLMCB_API void llmcb_op_cancel(llmcb_op *op);

/* Frees op. One that is under way is cancelled and detached: its handlers
 * still get their finish event. */
LLMCB_API void llmcb_op_free(llmcb_op *op);

/* The code alone; LLMCB_EBUSY while op is under way. */
LLMCB_API llmcb_code llmcb_op_code(const llmcb_op *op);

/* What went wrong; code LLMCB_OK if nothing did, or op is still under way.
 * Valid until llmcb_op_free. Never NULL. */
LLMCB_API const llmcb_error *llmcb_op_error(const llmcb_op *op);

/* What a step function returns; a negative llmcb_code: it failed with that.
 * LLMCB_WAIT without an await and other positive numbers end it with
 * LLMCB_ESTATE. */
typedef int llmcb_step;
#define LLMCB_DONE 0 /* finished */
#define LLMCB_WAIT 1 /* what every await function returns */

/* A coroutine. Only `at`, `result`, `frame` and `self` are yours. */
typedef struct llmcb_task {
    uint32_t at;       /* resume point, 0 at the first step */
    llmcb_code result; /* how the last await ended */
    void *frame;       /* frame_size zeroed bytes that survive awaits; NULL if
                          that is 0 */
    void *self;        /* what was given to llmcb_task_start */
    size_t index;      /* which one ended llmcb_await_any; n: none of them, but
                          its time or a cancel */
} llmcb_task;

/* A step function runs on the loop's thread until it awaits or ends. Locals
 * do not survive an await: keep what must in t->frame or t->self. */
typedef llmcb_step (*llmcb_task_fn)(llmcb_task *t);

/* The body of a step function stands between BEGIN and END; an AWAIT in
 * between returns and comes back when the awaited thing has ended, with its
 * code in t->result. One await a line, and none inside a switch of yours: a
 * lost resume point ends the task with LLMCB_ESTATE. In C++ declare locals
 * before BEGIN. A step function can do without the macros: it switches on
 * t->at, which it sets itself. */
/* clang-format off */
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
/* clang-format on */

/* Starts a coroutine later, at the latest in the loop's next turn, with
 * frame_size zeroed bytes at t->frame and `self` at t->self. Its code is what
 * its step returns. A cancel ends its present await with LLMCB_ECANCELLED; it
 * may clean up and await more. NULL: no memory, or not on the loop's thread. */
LLMCB_API llmcb_op *llmcb_task_start(llmcb_loop *loop, llmcb_task_fn fn,
                                     size_t frame_size, void *self);

/* The loop that a coroutine runs on. */
LLMCB_API llmcb_loop *llmcb_task_loop(const llmcb_task *t);

/* The awaits. Each arms one thing, always suspends, and ends early with
 * LLMCB_ECANCELLED when the coroutine is cancelled. A bad argument ends it
 * with LLMCB_EINVAL in the next turn, a NULL op with LLMCB_ENOMEM. */

/* Until ms milliseconds have passed; LLMCB_FOREVER: until a cancel. */
LLMCB_API llmcb_step llmcb_sleep(llmcb_task *t, int64_t ms);

/* Until fd is ready for events (LLMCB_READ, LLMCB_WRITE) or timeout_ms have
 * passed: LLMCB_ETIMEDOUT. One await a descriptor at a time: LLMCB_EBUSY. */
LLMCB_API llmcb_step llmcb_await_fd(llmcb_task *t, int fd, int events,
                                    int64_t timeout_ms);

/* Until op is done; its code. LLMCB_ESTATE from op itself, from a handler of
 * it or of what is within it, or from a start handler of the run that it is
 * within, since it begins behind that. */
LLMCB_API llmcb_step llmcb_await(llmcb_task *t, llmcb_op *op);

/* Until all n are done: LLMCB_OK, or the first code in the array that is
 * not. Until one is done: its code, its place in t->index. After timeout_ms
 * LLMCB_ETIMEDOUT; the operations go on. The array is copied. */
LLMCB_API llmcb_step llmcb_await_all(llmcb_task *t, llmcb_op *const *ops,
                                     size_t n, int64_t timeout_ms);
LLMCB_API llmcb_step llmcb_await_any(llmcb_task *t, llmcb_op *const *ops,
                                     size_t n, int64_t timeout_ms);

/* Until llmcb_op_next(op) would not wait: LLMCB_OK, also at the end. The last
 * chunk is valid no more. */
LLMCB_API llmcb_step llmcb_await_chunk(llmcb_task *t, llmcb_op *op);

/* Until every handler is done with what the run has told them so far; then
 * its window is empty. LLMCB_ESTATE from a handler of that run, LLMCB_EBUSY
 * while another coroutine awaits the same. */
LLMCB_API llmcb_step llmcb_await_run(llmcb_task *t, llmcb_run *run);

/* Until fn(arg) has run on the pool: the code of that, as of llmcb_offload. A
 * cancel ends the await at once, though fn goes on: arg must outlive it. */
LLMCB_API llmcb_step llmcb_await_blocking(llmcb_task *t, int (*fn)(void *arg),
                                          void *arg);

/* ==== [EXEC] the thread pool =========================================== */

/* Runs fn(arg) on the pool; the code of the op is what it returned: 0 or a
 * llmcb_code (-1 is LLMCB_ENOMEM), anything else is LLMCB_EHANDLER. NULL: no
 * memory, or not on the loop's thread. No thread could be started:
 * LLMCB_ESYS. */
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

/* One execution of a model, chain, tool or retriever. Read-only; valid as
 * long as the event that shows it, or the operation that it belongs to. */
struct llmcb_run {
    char id[37];        /* a UUID, version 4 unless the caller chose it */
    char parent_id[37]; /* "" for a root */
    const char *name;   /* the run's name, else the model's class */
    const char *const *tags;
    size_t n_tags;
    const llmcb_pair *metadata;
    size_t n_metadata;
    int64_t started_ms;  /* on the loop's clock */
    int64_t finished_ms; /* when its end or error event was made; else 0 */
};

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
    const char *step;         /* one more local tag, such as "seq:step:1" */
    llmcb_run *parent;        /* set by llmcb_run_child; wins over parent_id */
    const char *extra;        /* JSON object whose members go into this call's
                          requests, last: they win over the chat's extra */
} llmcb_config;

/* A handler that all runs of the loop are told to that start from now on,
 * behind those of their configuration and at most once each. It must outlive
 * the runs that began before llmcb_loop_unhook. LLMCB_EINVAL: see
 * llmcb_handler. LLMCB_ENOMEM. */
LLMCB_API llmcb_code llmcb_loop_hook(llmcb_loop *loop, llmcb_handler *h);
LLMCB_API void llmcb_loop_unhook(llmcb_loop *loop, llmcb_handler *h);

/* Adds an on_text or on_custom_event to a run that has started and is not
 * finished. The bytes are copied; it is delivered later, never inside this
 * call. Loop thread, or any thread from inside a sync handler of that run
 * while it handles an event. LLMCB_EBUSY: the run's window is full (never on
 * a worker: there the event is queued, and goes with a cancel). LLMCB_ESTATE:
 * not that moment. */
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

/* The role as the protocol names it, such as "user"; NULL: no such role.
 * Static. Any thread. */
LLMCB_API const char *llmcb_role_name(llmcb_role role);

/* A call of a tool that the model wishes for. */
typedef struct llmcb_tool_call {
    llmcb_str id;
    llmcb_str name;
    llmcb_str arguments; /* JSON text, as the model wrote it */
    bool valid;          /* has a name, and arguments that are one whole JSON
                            object or empty; they are never repaired */
} llmcb_tool_call;

/* One message of a conversation. */
typedef struct llmcb_message {
    llmcb_role role;
    const char *content;               /* UTF-8; NULL: none */
    size_t content_len;                /* bytes; 0: up to the NUL, so for an
                                          empty llmcb_str give "" or NULL */
    const char *name;                  /* optional */
    const char *tool_call_id;          /* of a LLMCB_TOOL message */
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
    bool complete; /* the server said that it ended, by [DONE] or a finish
                      reason of each choice, "length" among them. false:
                      partial, beside an error */
    bool sentinel; /* the stream's [DONE] was seen */
    const llmcb_generation *generations; /* one a choice */
    size_t n_generations;
    llmcb_str model_name; /* the model that served it */
    llmcb_str id;
    llmcb_str system_fingerprint;
    llmcb_usage usage;
    bool cached; /* it comes from the chat's cache */
} llmcb_result;

/* Payloads of events. */
typedef struct llmcb_start {
    const llmcb_message *messages; /* with content_len set */
    size_t n_messages;
    llmcb_str prompt;        /* "Human: ..." lines, for on_llm_start */
    const char *model;       /* the model asked for */
    size_t batch_size;       /* prompts of the same call */
    llmcb_str params;        /* JSON text: what is sent but the messages */
    llmcb_str input;         /* a chain's input, a tool's arguments, a query */
    const char *description; /* of a tool; else "" */
    llmcb_str tool_call_id;  /* of a tool that a model called; else "" */
} llmcb_start;

/* One document that a retriever found. */
typedef struct llmcb_document {
    llmcb_str content;
    llmcb_str id;
    const llmcb_pair *metadata;
    size_t n_metadata;
} llmcb_document;

/* What a chain, tool, retriever or agent has brought. */
struct llmcb_output {
    llmcb_str text;
    llmcb_str log; /* AGENT_FINISH: what the model said */
    const llmcb_document *documents;
    size_t n_documents;
    bool failed; /* TOOL_END: text is an error that goes to the model */
};

/* A tool call that an agent is about to make. */
typedef struct llmcb_action {
    llmcb_str tool;
    llmcb_str input; /* JSON text, as the model wrote it */
    llmcb_str log;   /* what the model said beside it */
    llmcb_str tool_call_id;
} llmcb_action;

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
    const llmcb_output *output; /* CHAIN_END, TOOL_END, RETRIEVER_END,
                                   AGENT_FINISH */
    const llmcb_action *action; /* AGENT_ACTION */
};

/* A sync function runs on the pool and may block. Not 0: it failed, which
 * is logged, or ends the run if the handler is flagged LLMCB_RAISE. */
typedef int (*llmcb_sync_fn)(llmcb_handler *h, const llmcb_event *ev);

/* An async function is a coroutine on the loop, with frame_size bytes of
 * the handler at t->frame, zeroed for each event. */
typedef llmcb_step (*llmcb_async_fn)(llmcb_task *t, llmcb_handler *h,
                                     const llmcb_event *ev);

#define LLMCBI_EVENTS(type)   \
    type on_llm_start;        \
    type on_chat_model_start; \
    type on_llm_new_token;    \
    type on_llm_end;          \
    type on_llm_error;        \
    type on_chain_start;      \
    type on_chain_end;        \
    type on_chain_error;      \
    type on_agent_action;     \
    type on_agent_finish;     \
    type on_tool_start;       \
    type on_tool_end;         \
    type on_tool_error;       \
    type on_retriever_start;  \
    type on_retriever_end;    \
    type on_retriever_error;  \
    type on_text;             \
    type on_retry;            \
    type on_custom_event;

typedef struct llmcb_sync_table {
    LLMCBI_EVENTS(llmcb_sync_fn)
} llmcb_sync_table;

typedef struct llmcb_async_table {
    LLMCBI_EVENTS(llmcb_async_fn)
} llmcb_async_table;
#undef LLMCBI_EVENTS

/* llmcb_handler.flags */
#define LLMCB_INLINE \
    1u                      /* sync functions run on the loop's thread, before
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

/* Bounds on what a server may send and on what waits for slow handlers. A
 * value of 0 is the default. */
typedef struct llmcb_limits {
    size_t header_line;   /* 16 KiB */
    size_t header_block;  /* 64 KiB */
    size_t header_fields; /* 128 */
    size_t event;         /* one line or event of a stream; 16 MiB */
    size_t text;          /* accumulated text of a call; 64 MiB */
    size_t arguments;     /* arguments of one tool call; 16 MiB */
    size_t tool_calls;    /* of a choice, and pieces in one event; 128 */
    size_t choices;       /* likewise; 128 */
    size_t error_body;    /* what is kept of an error answer; 64 KiB */
    size_t body;          /* 1 GiB */
    size_t window_events; /* undelivered events of a run; 1024 */
    size_t window_bytes;  /* their text; 1 MiB */
} llmcb_limits;

/* What a transport is to send. Valid until the exchange is over, or until
 * llmcb_exchange_sent. */
typedef struct llmcb_request {
    const char *method;
    const char *url;           /* http://, https:// or unix:/path:/target */
    const llmcb_pair *headers; /* all but Host and those of the framing */
    size_t n_headers;
    const char *body;
    size_t body_len;
    int64_t connect_ms; /* for dividing it among addresses */
    /* One a chat. Sockets are shared by equal ones only; libcurl's pool goes
     * by address and TLS options, and the key is part of each request. */
    uint64_t identity;
    const char *ca_file;        /* NULL: the system's */
    const llmcb_limits *limits; /* header_*, body; none is 0 */
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

/* A transport: put this struct first in one of yours, zeroed. All functions
 * are called on the loop's thread, and none while the transport is inside a
 * llmcb_exchange function. Of release, cancel and llmcb_exchange_end an
 * exchange sees one, once; what you do later, such as with llmcb_loop_post,
 * must not point into it. A coroutine of the loop may do the waiting, but is
 * an operation like any other: llmcb_loop_free may cancel it while its
 * exchange lives, whose cancel comes then. */
struct llmcb_transport {
    /* Bytes of llmcb_exchange_state, zeroed for each exchange. Constant. */
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

/* Gives a transport of yours to a loop, which calls its free function, if it
 * has one, when it is freed itself. LLMCB_EINVAL: another function is missing,
 * or the loop has it already. */
LLMCB_API llmcb_code llmcb_transport_init(llmcb_loop *loop,
                                          llmcb_transport *tr);

/* The transport's own bytes of an exchange. */
LLMCB_API void *llmcb_exchange_state(llmcb_exchange *x);

/* A connection stands; the request goes out. */
LLMCB_API void llmcb_exchange_connected(llmcb_exchange *x);

/* The request is out and will not be looked at again, so that its memory can
 * go. A transport that does not say so has it until the end. */
LLMCB_API void llmcb_exchange_sent(llmcb_exchange *x);

/* The final status, 200 to 599; not for interim responses. */
LLMCB_API void llmcb_exchange_status(llmcb_exchange *x, int status);

/* A header field; names in any case, both copied if needed. */
LLMCB_API void llmcb_exchange_header(llmcb_exchange *x, llmcb_str name,
                                     llmcb_str value);

/* Bytes of the body, transfer coding removed. All are taken; false: give no
 * more until resume is called. Inline handlers may be called inside; inside
 * one of these it only keeps the bytes. */
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

#ifndef LLMCB_NO_KIT
/* When bytes of a recording become available. */
typedef struct llmcb_segment {
    size_t offset;    /* of its first byte; ascending, the first is 0 */
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
 * loop. If there is nothing to play, since path is no recording, every
 * request fails with LLMCB_ESYS and a message that names it; if there was no
 * memory, with LLMCB_ENOMEM. NULL, for which a chat takes its default: no
 * loop, not its thread, or no descriptor. */
LLMCB_API llmcb_transport *llmcb_replay_new(llmcb_loop *loop,
                                            const llmcb_replay_desc *desc);

/* A transport that hands everything to `inner` and writes each response to
 * path, NAME-2.http, ... with NAME.segments.json beside it, mode 0600, in a
 * form that llmcb_replay_new plays; what an earlier recording of more responses
 * left behind stays. Of the request nothing is written, of the response no
 * cookies. What cannot be written is logged, and the call goes on. Belongs to
 * the loop. No memory: every request fails with LLMCB_ENOMEM. NULL: bad
 * arguments, or not the loop's thread. */
LLMCB_API llmcb_transport *
llmcb_record_new(llmcb_loop *loop, llmcb_transport *inner, const char *path);
#endif

/* ==== [CHAT] chat calls ================================================ */

typedef struct llmcb_chat llmcb_chat;

/* A bucket of tokens that fills up with time. Each request takes one, or
 * waits for it in order of arrival; retries and answers from a cache take
 * none. It may serve several chats of its loop, lives as long as they do and
 * is to be freed before the loop. Starts empty. */
typedef struct llmcb_limiter llmcb_limiter;

/* Answers by the request that brought them, in memory. A call whose address
 * and request are the same to the byte gets the answer without any request,
 * after its start event: no tokens, then the end event with result->cached.
 * Keys and other headers are not looked at.
 * llmcb_chat_stream does not look there, and answers with log-probabilities
 * are not kept. It may serve several chats of its loop, and lives as long as
 * they do. */
typedef struct llmcb_cache llmcb_cache;

#ifndef LLMCB_NO_KIT
/* burst: what the bucket holds at most, 0 for 1. NULL: no memory, or
 * per_minute is 0. */
LLMCB_API llmcb_limiter *llmcb_limiter_new(llmcb_loop *loop,
                                           unsigned per_minute, unsigned burst);
LLMCB_API void llmcb_limiter_free(llmcb_limiter *limiter);

/* max_bytes of requests and answers, 0 for 16 MiB; the oldest go first.
 * NULL: no memory. */
LLMCB_API llmcb_cache *llmcb_cache_new(llmcb_loop *loop, size_t max_bytes);
LLMCB_API void llmcb_cache_free(llmcb_cache *cache);
#endif

/* Zero is the default of every member. */
typedef struct llmcb_chat_desc {
    const char *model;        /* "gpt-4o-mini" */
    const char *base_url;     /* OPENAI_BASE_URL, else OpenAI's; or
                                 unix:/path/to/socket:/v1. What is asked is
                                 that and /chat/completions */
    const char *api_key;      /* OPENAI_API_KEY; "": none */
    const char *organization; /* OPENAI_ORG_ID */
    bool streaming;           /* llmcb_chat_generate streams too */
    int max_tokens;           /* 0: the server's default. For a model that
                                 wants max_completion_tokens use extra */
    int n;                    /* choices; default 1 */
    const char *tools;        /* JSON array of tool definitions */
    const char *extra;        /* JSON object whose members are sent last and
                                 win: temperature, stop, seed, ... */
    bool no_usage;            /* do not ask for usage in streams */
    int max_retries;          /* default 2; negative: none. What is tried
                                 again, see llmcb_chat_generate */
    int64_t connect_ms;       /* 10,000 */
    int64_t first_byte_ms;    /* 600,000 */
    int64_t idle_ms;          /* 120,000; between events with data, and from
                                 the answer's first byte to the first */
    int64_t total_ms;         /* none; of each prompt from its turn to be sent
                                 on, with the wait for a limiter and retries,
                                 but not while handlers or the reader of its
                                 chunks hold it. LLMCB_FOREVER for none in all
                                 four */
    int64_t handler_ms;       /* none; how long a call waits for one event of a
                                 handler, other runs of it that come first
                                 included, before it fails */
    llmcb_limits limits;
    const llmcb_pair *headers; /* further request headers */
    size_t n_headers;
    llmcb_transport *transport; /* default: libcurl, or sockets without it */
    const char *ca_file;        /* PEM; default: the system's */
    bool http2;                 /* with libcurl: offered where there is TLS */
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
    llmcb_limiter *limiter; /* default: none */
    llmcb_cache *cache;     /* default: none */
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
 * they come. config may be NULL. NULL: no memory, or not on the loop's
 * thread, as of all functions that start something.
 *
 * Up to max_retries times it is asked again, if no event of an answer has come:
 * after statuses 408, 409, 429 and 5xx, unless the server says otherwise
 * (x-should-retry), after failures of the network and a first byte that did
 * not come. Between two tries lies half a second, doubled each time up to 8
 * and shortened at random, or what the server wishes, up to two minutes: for
 * more the call fails. Handlers are told (on_retry), but not of the one more
 * time that a request is sent whose kept connection turns out to be dead. */
LLMCB_API llmcb_op *llmcb_chat_generate(llmcb_chat *chat,
                                        const llmcb_message *messages, size_t n,
                                        const llmcb_config *config);

/* The same, always streaming, for reading with llmcb_op_next. At the window
 * the connection is held, and its time limits stand still, until chunks are
 * read or the op is waited for or awaited, which discards what is unread. */
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
 * op is done. Inside a callback it does not wait: false with an op that is not
 * done means none now; llmcb_await_chunk waits. After llmcb_op_cancel there may
 * be more of what has come: who wants no more leaves his loop and frees op. */
LLMCB_API bool llmcb_op_next(llmcb_op *op, const llmcb_chunk **chunk);

/* The result, whole or partial, of an agent that of its last model call; of
 * an op that has none, is NULL or is still under way, an empty one. Valid
 * until llmcb_op_free. Never NULL. */
LLMCB_API const llmcb_result *llmcb_op_result(const llmcb_op *op);

/* The same for prompt i of a batch, with its own error and run. Of other
 * operations 0 is what the op itself has. */
LLMCB_API size_t llmcb_op_n_prompts(const llmcb_op *op);
LLMCB_API const llmcb_result *llmcb_op_result_at(const llmcb_op *op, size_t i);
LLMCB_API const llmcb_error *llmcb_op_error_at(const llmcb_op *op, size_t i);
LLMCB_API llmcb_run *llmcb_op_run_at(const llmcb_op *op, size_t i);

/* What a run of llmcb_run_start, a tool or an agent has brought; empty while
 * it is under way, and of other operations. Valid until llmcb_op_free. Never
 * NULL. */
LLMCB_API const llmcb_output *llmcb_op_output(const llmcb_op *op);

/* The text of that, or of a chat call its first answer: what there is of it
 * after an error, "" while it is under way. Valid until llmcb_op_free. */
LLMCB_API llmcb_str llmcb_op_text(const llmcb_op *op);

/* The op's own run, of a batch the first; NULL: it has none. Valid until
 * llmcb_op_free. */
LLMCB_API llmcb_run *llmcb_op_run(const llmcb_op *op);

/* The usage of all prompts, or of all turns of an agent, added up; known if
 * all are. */
LLMCB_API llmcb_usage llmcb_op_usage(const llmcb_op *op);

/* ==== [AGENT] runs of the program, tools, the agent loop =============== */

#ifndef LLMCB_NO_AGENT
typedef enum llmcb_run_kind {
    LLMCB_RUN_CHAIN, /* any work that has parts, or a group of calls */
    LLMCB_RUN_TOOL,
    LLMCB_RUN_RETRIEVER
} llmcb_run_kind;

/* Zero is the default of every member. */
typedef struct llmcb_run_desc {
    llmcb_run_kind kind;
    const char *name; /* "chain", "tool" or "retriever" */
    llmcb_str input;
    const char *description; /* of a tool */
    /* The work as a coroutine. It begins when the start event has been told;
     * when it ends, so does the run, with what it returned. NULL: the program
     * ends the run with one of the functions below. */
    llmcb_task_fn body;
    size_t frame_size; /* as in llmcb_task_start */
    void *self;
    int64_t timeout_ms; /* of the run; default none */
    int64_t handler_ms; /* as in llmcb_chat_desc */
} llmcb_run_desc;

/* Starts a run for work of the program's own: its handlers are told, and
 * calls that are given llmcb_run_child of it become its children.
 *
 * It finishes exactly once, after its children: when it is ended, failed or
 * cancelled, when its body ends, its parent ends or the op is freed. If it
 * fails or is cancelled, what is under way within it is cancelled; if it
 * ends well, that is waited for, but runs without a body that were left open
 * are cancelled. The op is done when all handlers have been told.
 * config may be NULL. NULL: no memory. */
LLMCB_API llmcb_op *llmcb_run_start(llmcb_loop *loop,
                                    const llmcb_run_desc *desc,
                                    const llmcb_config *config);

/* The configuration of a child: the callbacks, tags and metadata of run's
 * configuration but not its local ones, and run as the parent. `step` is a
 * local tag of the child, such as "seq:step:1"; NULL: none. For runs of
 * llmcb_run_start, tools and agents; else it is empty. Points into run, and
 * at step. */
LLMCB_API llmcb_config llmcb_run_child(llmcb_run *run, const char *step);

/* The run whose body this coroutine is; NULL: of none. */
LLMCB_API llmcb_run *llmcb_task_run(llmcb_task *t);

/* Ends a run of llmcb_run_start well; the output is copied. Inside a body it
 * says what the run brings, and the body goes on to its end. LLMCB_ESTATE:
 * its outcome is known already, or it is not such a run. LLMCB_ENOMEM: it
 * fails with that. */
LLMCB_API llmcb_code llmcb_run_end(llmcb_run *run, llmcb_str output);

/* The same for a retriever. */
LLMCB_API llmcb_code llmcb_run_end_documents(llmcb_run *run,
                                             const llmcb_document *documents,
                                             size_t n);

/* Ends it with an error, such as the one of a child. A code that is
 * LLMCB_OK is taken for LLMCB_EINVAL. Returns the error's code, so that a
 * body can say `return llmcb_run_fail(run, llmcb_op_error(op));`, or why it
 * is not legal, as llmcb_run_end. */
LLMCB_API llmcb_code llmcb_run_fail(llmcb_run *run, const llmcb_error *error);

/* on_agent_action and on_agent_finish of an agent of the program's own, as
 * llmcb_run_text. Loop thread. */
LLMCB_API llmcb_code llmcb_run_action(llmcb_run *run,
                                      const llmcb_action *action);
LLMCB_API llmcb_code llmcb_run_agent_finish(llmcb_run *run, llmcb_str output,
                                            llmcb_str log);

/* One call of a tool, in the tool's hands until it returns. */
typedef struct llmcb_tool_use {
    const struct llmcb_tool *tool;
    llmcb_str arguments; /* one JSON object, checked */
    llmcb_str id;        /* of the model's call; may be "" */
    llmcb_run *run;      /* for llmcb_run_text, llmcb_run_child ... */
} llmcb_tool_use;

/* A tool that a model may call. It is not copied and must outlive its
 * calls. */
typedef struct llmcb_tool {
    const char *name;
    const char *description; /* for the model; may be NULL */
    /* JSON schema of the arguments, an object; NULL: there are none, and those
     * that come are not looked at. What it says of types, of required members
     * and of additional ones is checked, on the first level, before the tool
     * is called. An integer must fit into an int64_t, a number into a double
     * and 399 characters. */
    const char *parameters;
    /* One of the two. A blocking function, on the thread pool; or a coroutine
     * on the loop, with `user` at t->self and frame_size bytes at t->frame.
     * Not 0: it failed, with that llmcb_code (-1 is LLMCB_ENOMEM) or, as with
     * llmcb_tool_fail, LLMCB_ETOOL. */
    int (*call)(llmcb_tool_use *use);
    llmcb_step (*step)(llmcb_task *t, llmcb_tool_use *use);
    size_t frame_size;
    int64_t timeout_ms; /* after approval, if one is asked for; default none.
                           A blocking function goes on, a coroutine is
                           cancelled */
    bool handle_errors; /* tell the model what went wrong, and go on; else the
                           agent fails with it, and says which tool it was */
    void *user;
} llmcb_tool;

/* Inside a tool, on its own thread: an argument by its name. false: it is not
 * there, or is no such value. _text is decoded, NUL-terminated and valid
 * until the call is over; _json is the value as it stands, of any kind. */
LLMCB_API bool llmcb_tool_text(llmcb_tool_use *use, const char *name,
                               llmcb_str *value);
LLMCB_API bool llmcb_tool_int(llmcb_tool_use *use, const char *name,
                              int64_t *value);
LLMCB_API bool llmcb_tool_number(llmcb_tool_use *use, const char *name,
                                 double *value);
LLMCB_API bool llmcb_tool_bool(llmcb_tool_use *use, const char *name,
                               bool *value);
LLMCB_API bool llmcb_tool_json(llmcb_tool_use *use, const char *name,
                               llmcb_str *value);

/* What the tool answers; copied, the last one counts. LLMCB_ENOMEM, or LLMCB_OK
 * for `return llmcb_tool_answer(...)`. */
LLMCB_API llmcb_code llmcb_tool_answer(llmcb_tool_use *use, llmcb_str text);

/* Why the tool fails, in words for the model or for people: always
 * LLMCB_ETOOL, for `return llmcb_tool_fail(...)`. */
LLMCB_API llmcb_code llmcb_tool_fail(llmcb_tool_use *use, const char *why);

/* Calls a tool as a run of its own. Of `call` the name is not looked at; all
 * is copied. config may be NULL. NULL: no memory. */
LLMCB_API llmcb_op *llmcb_tool_start(llmcb_loop *loop, const llmcb_tool *tool,
                                     const llmcb_tool_call *call,
                                     const llmcb_config *config);

/* Zero is the default of every member. */
typedef struct llmcb_agent_desc {
    llmcb_chat *chat;
    const llmcb_tool *tools; /* not copied */
    size_t n_tools;
    int max_turns;    /* calls of the model; 15 */
    int64_t total_ms; /* none */
    /* Asked before each call of a tool, as a coroutine with `user` at t->self
     * and approve_frame bytes at t->frame. LLMCB_DONE lets it go on, any
     * other end refuses it, which the model is told. */
    llmcb_step (*approve)(llmcb_task *t, const llmcb_tool_use *use);
    size_t approve_frame;
    void *user;
    int64_t handler_ms; /* as in llmcb_chat_desc */
} llmcb_agent_desc;

/* Lets the model call tools, those of one turn in parallel, until it answers.
 * Its run is a chain, "AgentExecutor", with a chain for each turn and a run
 * for each tool. llmcb_op_output is the answer. At max_turns or total_ms it
 * ends in good order, as LangChain's does, but the op's code is LLMCB_ELIMIT
 * or LLMCB_ETIMEDOUT, so that the text is not taken for an answer. The chat
 * must not be freed before the op is done. NULL: no memory, or no chat. */
LLMCB_API llmcb_op *llmcb_agent_start(const llmcb_agent_desc *desc,
                                      const llmcb_message *messages, size_t n,
                                      const llmcb_config *config);

/* The conversation of an agent, with what it added: the model's messages and
 * the tools' answers of all turns that were whole, not the last answer of all.
 * Valid until llmcb_op_free; NULL while it is under way. */
LLMCB_API const llmcb_message *llmcb_agent_messages(const llmcb_op *op,
                                                    size_t *n);
#endif

/* ==== [KIT] ready-made handlers ======================================== */

#ifndef LLMCB_NO_KIT
/* Each is made with the loop's allocator, and is to be freed when no run uses
 * it any more, before or after the loop. They lock what they keep: one may
 * serve several loops. NULL: no memory. */
LLMCB_API void llmcb_handler_free(llmcb_handler *h);

/* Usage by the model that served, read at any time. Answers from a cache do
 * not count. model NULL: all. known: all of them said. */
LLMCB_API llmcb_handler *llmcb_usage_handler(llmcb_loop *loop);
LLMCB_API llmcb_usage llmcb_usage_of(llmcb_handler *h, const char *model);

/* The i-th model that was seen; NULL: there are no more. Valid until the
 * handler is freed. */
LLMCB_API const char *llmcb_usage_model(llmcb_handler *h, size_t i);

/* One run, as a collector has seen it. */
typedef struct llmcb_run_record {
    char id[37];
    char parent_id[37]; /* "" for a root */
    const char *name;
    llmcb_event_kind kind; /* of its start */
    int64_t started_ms, finished_ms;
    bool finished;
    bool cached;
    llmcb_code code;
    uint64_t tokens; /* that had text */
    llmcb_usage usage;
    const char *output; /* what it brought, or the error's message; NULL: not
                           finished, or no memory */
} llmcb_run_record;

/* Collects all runs, in the order of their starts. The array is valid until
 * the next event of any loop that it serves; clear forgets what has
 * finished. */
LLMCB_API llmcb_handler *llmcb_collector(llmcb_loop *loop);
LLMCB_API const llmcb_run_record *llmcb_collector_runs(llmcb_handler *h,
                                                       size_t *n);
LLMCB_API void llmcb_collector_clear(llmcb_handler *h);

/* The pace of one model run. */
typedef struct llmcb_timing {
    uint64_t runs;   /* that have ended */
    uint64_t tokens; /* of the last of them, as the following; with text */
    int64_t first_token_ms; /* after the start; -1: there was none */
    int64_t longest_gap_ms; /* between two tokens */
    int64_t total_ms;
    double tokens_per_second; /* from the first token to the last */
} llmcb_timing;

LLMCB_API llmcb_handler *llmcb_timing_handler(llmcb_loop *loop);
LLMCB_API llmcb_timing llmcb_timing_of(llmcb_handler *h);

#ifndef LLMCB_NO_STDIO
/* Appends one JSON object a line to a file, in one write: event, time_ms since
 * 1970, run_id, parent_run_id and seq, as in llmcb_event, and of each kind of
 * event what it has: names, tags, metadata, lengths, usage and errors. What was
 * said only with `content`, but for documents and tool calls, of which there is
 * the number; the key never. The file is made with mode 0600. If it cannot be
 * written that is logged once, and the trace ends there. NULL: it cannot be
 * opened, or is no regular file; see errno. */
LLMCB_API llmcb_handler *llmcb_jsonl_handler(llmcb_loop *loop, const char *path,
                                             bool content);

/* Prints the text of tokens as they come, as llmcb_str_print does, or as it
 * is. `out` must outlive the handler, here and below. */
LLMCB_API llmcb_handler *llmcb_token_handler(llmcb_loop *loop, FILE *out,
                                             bool raw);

/* Prints each tree of runs with their durations when its root has ended. */
LLMCB_API llmcb_handler *llmcb_tree_handler(llmcb_loop *loop, FILE *out);

/* Appends what chains, tools and agents do to a file, for people. NULL: it
 * cannot be opened; see errno. */
LLMCB_API llmcb_handler *llmcb_file_handler(llmcb_loop *loop, const char *path);
#endif
#endif

#ifndef LLMCB_NO_STDIO
/* Prints text of a server for a terminal: control characters, but for line
 * ends and tabs, and those that turn the direction of writing are shown as
 * escapes. Pieces may be printed one by one, as they come. */
LLMCB_API void llmcb_str_print(llmcb_str text, FILE *out);

/* Prints text, finish reason, model name and usage, for people, each string
 * as llmcb_str_print does. */
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
#include <stdarg.h>
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
#include <sys/uio.h>
#include <sys/un.h>
#endif
#ifndef LLMCB_NO_STDIO
#include <sys/stat.h>
#endif
/* tcc lays epoll's packed struct out wrongly */
#if defined(__linux__) && !defined(LLMCB_NO_EPOLL) && !defined(__TINYC__)
#define LLMCBI_EPOLL 1
#include <sys/epoll.h>
#else
#define LLMCBI_EPOLL 0
#endif
#ifndef LLMCB_NO_CURL
#include <curl/curl.h>
#endif
#if !defined(CLOCK_MONOTONIC) || !defined(O_CLOEXEC)
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

/* The struct that a member belongs to. */
#define LLMCBI_OWNER(type, member, ptr) \
    ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

/* Shortcuts that save nothing but time are left out where size matters more;
 * tests try both. */
#ifndef LLMCBI_QUICK
#ifdef __OPTIMIZE_SIZE__
#define LLMCBI_QUICK 0
#else
#define LLMCBI_QUICK 1
#endif
#endif

/* Has memory come that will be read soon. A stream that is one of many has
 * left the cache when its next token is there, and what that needs would come
 * piece by piece, each found in the one before. (Not from a function: without
 * an effect that the compiler knows, its call would be left out.) */
#if LLMCBI_QUICK && defined(__GNUC__)
#define LLMCBI_FETCH(ptr) __builtin_prefetch(ptr)
#else
#define LLMCBI_FETCH(ptr) ((void)(ptr))
#endif

/* Every system call goes through this name, so that a test can define it
 * and make any of them fail. */
#ifndef LLMCBI_SYS
#define LLMCBI_SYS(call) call
#endif

/* A function that makes its callers larger, by more than itself, when it
 * becomes a part of them. */
#if defined(__GNUC__) && defined(__OPTIMIZE_SIZE__)
#define LLMCBI_APART __attribute__((noinline))
#else
#define LLMCBI_APART
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

#define LLMCBI_CODES(X)                                                \
    X(LLMCB_OK, "no error")                                            \
    X(LLMCB_ENOMEM, "out of memory")                                   \
    X(LLMCB_EINVAL, "invalid argument")                                \
    X(LLMCB_ESTATE, "not legal in this state")                         \
    X(LLMCB_ECANCELLED, "cancelled")                                   \
    X(LLMCB_ETIMEDOUT, "timed out")                                    \
    X(LLMCB_EDNS, "the host name could not be resolved")               \
    X(LLMCB_ECONNECT, "could not connect to the server")               \
    X(LLMCB_ETLS, "TLS handshake or certificate failure")              \
    X(LLMCB_EIO, "the connection broke")                               \
    X(LLMCB_ETRUNCATED, "the answer ended before it was complete")     \
    X(LLMCB_EHTTP, "the server answered with an error status")         \
    X(LLMCB_EAPI, "the server reported an error")                      \
    X(LLMCB_EPROTO, "the server broke the protocol")                   \
    X(LLMCB_ECTYPE, "the answer has an unexpected type or encoding")   \
    X(LLMCB_EREDIRECT, "the server redirected, which is not followed") \
    X(LLMCB_EJSON, "the answer is not valid JSON")                     \
    X(LLMCB_EUTF8, "text is not valid UTF-8")                          \
    X(LLMCB_ELIMIT, "a limit was exceeded")                            \
    X(LLMCB_EHANDLER, "a handler failed")                              \
    X(LLMCB_EBUSY, "busy")                                             \
    X(LLMCB_ESYS, "a system call failed")                              \
    X(LLMCB_EFORK, "the loop belongs to the parent process")           \
    X(LLMCB_ETOOL, "a tool failed")

/* The codes count down from 0 in the order of this list. */
static bool llmcbi_code_known(int code)
{
    return code <= LLMCB_OK && code >= LLMCB_ETOOL;
}

LLMCBI_DEF const char *llmcb_code_name(llmcb_code code)
{
#define LLMCBI_ENTRY(name, text) #name,
    static const char *const names[] = { LLMCBI_CODES(LLMCBI_ENTRY) };
#undef LLMCBI_ENTRY

    return llmcbi_code_known(code) ? names[-code] : "LLMCB_UNKNOWN";
}

LLMCBI_DEF const char *llmcb_code_text(llmcb_code code)
{
#define LLMCBI_ENTRY(name, text) text,
    static const char *const texts[] = { LLMCBI_CODES(LLMCBI_ENTRY) };
#undef LLMCBI_ENTRY

    return llmcbi_code_known(code) ? texts[-code] : "unknown error";
}

LLMCBI_DEF llmcb_str llmcb_text(const char *s)
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

static bool llmcbi_str_equal(llmcb_str a, llmcb_str b)
{
    return a.len == b.len && (!a.len || memcmp(a.ptr, b.ptr, a.len) == 0);
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
        if (!lower[i] || llmcbi_lower(s.ptr[i]) != lower[i]) return false;
    return lower[i] == '\0';
}

/* Whether s is one of the words of a list, which are in lower case and
 * parted by blanks. */
static bool llmcbi_str_listed(llmcb_str s, const char *list)
{
    while (*list) {
        size_t i, n = strcspn(list, " ");
        for (i = 0; i < n && i < s.len && llmcbi_lower(s.ptr[i]) == list[i];)
            i++;
        if (i == n && i == s.len) return true;
        list += n + (list[n] == ' ');
    }
    return false;
}

static bool llmcbi_str_begins(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
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

/* For what is shown as const and is ours to change or to free. */
static void *llmcbi_unconst(const void *ptr)
{
    union {
        const void *in;
        void *out;
    } p;

    p.in = ptr;
    return p.out;
}

static void llmcbi_free(const llmcb_allocator *a, void *ptr, size_t size)
{
    if (ptr) a->resize(a->user, ptr, size, 0);
}

/* A wipe that the compiler does not take for a dead store. */
static void llmcbi_wipe(void *ptr, size_t size)
{
    void *(*volatile set)(void *, int, size_t) = memset;

    if (size) set(ptr, 0, size);
}

/* Bytes of the UTF-8 sequence that `first` opens; 0: none does. */
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

/* Bytes of the whole valid sequence that stands at s; 0: none does. */
static size_t llmcbi_utf8_at(const char *s, size_t len)
{
    unsigned char first = (unsigned char)*s;
    int k, size = llmcbi_utf8_size(first);

    if ((size_t)size > len) return 0;
    for (k = 1; k < size; k++)
        if (!llmcbi_utf8_follows(first, k, (unsigned char)s[k])) return 0;
    return (size_t)size;
}

static bool llmcbi_utf8_valid(const char *s, size_t len)
{
    size_t n = 0;

    for (; len; s += n, len -= n)
        if ((n = llmcbi_utf8_at(s, len)) == 0) return false;
    return true;
}

/* Copies as much as fits, with a NUL, as valid UTF-8 of the same length:
 * what a terminal or a log might act on becomes blanks, what is no UTF-8
 * question marks. */
static void llmcbi_copy_clean(char *out, size_t cap, const char *s, size_t len)
{
    while (len) {
        size_t n = llmcbi_utf8_at(s, len);
        size_t take = n ? n : 1;
        unsigned char c = (unsigned char)*s;
        if (take >= cap) break;
        if (!n)
            *out = '?';
        else if (c < 0x20 || c == 0x7F ||
                 (c == 0xC2 && (unsigned char)s[1] < 0xA0)) /* C1 */
            memset(out, ' ', n);
        else
            memcpy(out, s, n);
        out += take;
        cap -= take;
        s += take;
        len -= take;
    }
    *out = '\0';
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
    if (more < b->cap - b->len) return true;
    if (more > SIZE_MAX / 4 - b->len) {
        b->failed = true;
        return false;
    }
    if (!b->cap && more >= cap) cap = more + 1; /* perhaps that is all */
    while (cap - b->len <= more)
        cap += cap / 2 + 1;
    p = (char *)llmcbi_resize(a, b->ptr, b->cap, cap);
    if (!p) {
        b->failed = true;
        return false;
    }
    b->ptr = p;
    b->cap = cap;
    return true;
}

/* Gives back what it does not need, if the allocator does that. */
static void llmcbi_buf_trim(const llmcb_allocator *a, llmcbi_buf *b)
{
    char *p = b->len + 1 < b->cap
                  ? (char *)llmcbi_resize(a, b->ptr, b->cap, b->len + 1)
                  : NULL;

    if (!p) return;
    b->ptr = p;
    b->cap = b->len + 1;
}

static void llmcbi_buf_add(const llmcb_allocator *a, llmcbi_buf *b,
                           const char *s, size_t len)
{
    if ((b->failed || len >= b->cap - b->len) && !llmcbi_buf_reserve(a, b, len))
        return;
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
    do
        *--p = (char)('0' + u % 10);
    while ((u /= 10) != 0);
    if (v < 0) *--p = '-';
    return p;
}

static llmcb_str llmcbi_buf_str(const llmcbi_buf *b)
{
    return b->len ? llmcbi_slice(b->ptr, b->len) : llmcbi_slice("", 0);
}

/* Memory that is freed as one. Zeroed: empty. */
typedef struct llmcbi_arena_block {
    struct llmcbi_arena_block *next;
    size_t size;
} llmcbi_arena_block;

typedef struct llmcbi_arena {
    llmcbi_arena_block *blocks;
    char *at;
    size_t left;
    bool failed;
} llmcbi_arena;

#define LLMCBI_ALIGN(n) (((n) + 15) & ~(size_t)15)

/* A block of exactly that size, for what is known to be needed. */
static void llmcbi_arena_room(const llmcb_allocator *a, llmcbi_arena *arena,
                              size_t room)
{
    size_t head = LLMCBI_ALIGN(sizeof(llmcbi_arena_block));
    llmcbi_arena_block *b = NULL;

    if (room <= SIZE_MAX / 4)
        b = (llmcbi_arena_block *)llmcbi_alloc(a, head + room);
    if (!b) {
        arena->failed = true;
        return;
    }
    b->size = head + room;
    b->next = arena->blocks;
    arena->blocks = b;
    arena->at = (char *)b + head;
    arena->left = room;
}

/* Zeroed, and aligned for anything. */
static void *llmcbi_arena_get(const llmcb_allocator *a, llmcbi_arena *arena,
                              size_t size)
{
    void *p;

    if (size > SIZE_MAX / 4) arena->failed = true;
    if (arena->failed) return NULL;
    if (!size) return arena->at; /* perhaps NULL, to which nothing is added */
    size = LLMCBI_ALIGN(size);
    if (size > arena->left) {
        llmcbi_arena_room(a, arena, size > 480 ? size : 480);
        if (arena->failed) return NULL;
    }
    p = arena->at;
    arena->at += size;
    arena->left -= size;
    return p;
}

/* A copy with a NUL; never NULL. */
static const char *llmcbi_arena_text(const llmcb_allocator *a,
                                     llmcbi_arena *arena, const char *s,
                                     size_t len)
{
    char *p = (char *)llmcbi_arena_get(a, arena, len + 1);

    if (!p) return "";
    if (len) memcpy(p, s, len);
    return p;
}

static llmcb_str llmcbi_arena_str(const llmcb_allocator *a, llmcbi_arena *arena,
                                  llmcb_str s)
{
    s.ptr = llmcbi_arena_text(a, arena, s.ptr, s.len);
    return s;
}

static void llmcbi_arena_free(const llmcb_allocator *a, llmcbi_arena *arena)
{
    while (arena->blocks) {
        llmcbi_arena_block *b = arena->blocks;
        arena->blocks = b->next;
        llmcbi_free(a, b, b->size);
    }
    memset(arena, 0, sizeof *arena);
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
    llmcbi_copy_clean(e->message, sizeof e->message, message, strlen(message));
}

/* Appends to the message, as far as it fits. */
static void llmcbi_error_add(llmcb_error *e, const char *text, size_t len)
{
    size_t used = strlen(e->message);

    llmcbi_copy_clean(e->message + used, sizeof e->message - used, text, len);
}

/* What is said when there is no memory left to say more. */
LLMCBI_APART static const llmcb_error *llmcbi_error_const(llmcb_code code)
{
#define LLMCBI_ENTRY(name, text) \
    { name, LLMCB_DETAIL_NONE, 0, 0, 0, -1, "", "", "", text, 0 },
    static const llmcb_error table[] = { LLMCBI_CODES(LLMCBI_ENTRY) };
#undef LLMCBI_ENTRY

    return &table[llmcbi_code_known(code) ? -code : 1];
}

/* What a function of the program returned, if it is one of our codes. */
static llmcb_code llmcbi_code_of(int value)
{
    return llmcbi_code_known(value) ? (llmcb_code)value : LLMCB_EHANDLER;
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
    if (e && e != llmcbi_error_const(e->code))
        llmcbi_free(a, llmcbi_unconst(e), sizeof *e);
}

#if !defined(LLMCB_NO_SOCKETS) || !defined(LLMCB_NO_CURL)
/* Whether this machine, and not the network, is short of something. */
LLMCBI_APART static bool llmcbi_errno_is_local(int e)
{
    return e == EMFILE || e == ENFILE || e == ENOBUFS || e == ENOMEM;
}
#endif

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

/* The end of time, on any loop's clock. */
#define LLMCBI_LAST_MS (INT64_MAX / 2)

/* A span of time that can be added to any moment. */
LLMCBI_APART static int64_t llmcbi_span(int64_t ms)
{
    return ms < INT64_MAX / 4 ? ms : INT64_MAX / 4;
}

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
        do
            n = LLMCBI_SYS(read)(fd, r->s, sizeof r->s);
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
    uint8_t n; /* bytes of an incomplete UTF-8 sequence */
    uint8_t bytes[3];
    uint16_t high; /* a high surrogate, or 0 */
} llmcbi_carry;

static char *llmcbi_put_replacement(char *out)
{
    memcpy(out, "\xEF\xBF\xBD", 3);
    return out + 3;
}

static char *llmcbi_put_utf8(char *out, uint32_t cp)
{
    static const unsigned char first[] = { 0, 0xC0, 0xE0, 0xF0 };
    int more = (cp >= 0x80) + (cp >= 0x800) + (cp >= 0x10000);

    *out++ = (char)(first[more] | cp >> 6 * more);
    while (more--)
        *out++ = (char)(0x80 | (cp >> 6 * more & 63));
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

/* What a hexadecimal digit is worth; more than 15: it is none. Letters come as
 * they like in the sizes of chunks, so no branch asks for them. */
static inline unsigned llmcbi_hex(char c)
{
    static const unsigned char more[256] = {
        /* by one */
        0, 0, 0, 0,  0, 0, 0, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
        0, 0, 0, 0,  0, 0, 0, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
        0, 0, 0, 0,  0, 0, 0, 0,  0,  0,  0,  0,  1,  2,  3,  4,  5,  6,
        7, 8, 9, 10, 0, 0, 0, 0,  0,  0,  0,  11, 12, 13, 14, 15, 16, 0,
        0, 0, 0, 0,  0, 0, 0, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
        0, 0, 0, 0,  0, 0, 0, 11, 12, 13, 14, 15, 16
    };

    return more[(unsigned char)c] - 1u;
}

/* What four hexadecimal digits are worth; more than 0xFFFF: they are not. */
static uint32_t llmcbi_hex4(const char *s)
{
    uint32_t v = 0;
    int i;

    for (i = 0; i < 4; i++)
        v = v << 4 | llmcbi_hex(s[i]);
    return v;
}

#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__)
#define LLMCBI_LITTLE_ENDIAN (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
#else
#define LLMCBI_LITTLE_ENDIAN 0
#endif

/* Skips plain ASCII text, eight bytes at a time: no quote, no backslash, none
 * below 0x20 or above 0x7F. */
static inline const char *llmcbi_json_plain(const char *p, const char *end)
{
    const uint64_t ones = 0x0101010101010101u, tops = ones << 7;
    unsigned char c;

    for (; end - p >= 8; p += 8) {
        uint64_t w, q, b;
        memcpy(&w, p, 8);
        q = w ^ ones * '"';
        b = w ^ ones * '\\';
        q = ((w - ones * 0x20) | (q - ones) | (b - ones) | w) & tops;
        if (!q) continue;
#if LLMCBI_LITTLE_ENDIAN && defined(__GNUC__)
        return p + __builtin_ctzll(q) / 8; /* no borrow comes from below it */
#else
        break;
#endif
    }
    for (; p < end; p++) {
        c = (unsigned char)*p;
        if (c == '"' || c == '\\' || c < 0x20 || c > 0x7F) break;
    }
    return p;
}

/* What the letters from 'b' to 't' stand for behind a backslash. */
static const char llmcbi_json_meant[] =
    "\b\0\0\0\f\0\0\0\0\0\0\0\n\0\0\0\r\0\t";

/* What any stands for; 0: nothing. */
static inline char llmcbi_json_unescape(char c)
{
    if (c >= 'b' && c <= 't') return llmcbi_json_meant[c - 'b'];
    return c == '"' || c == '\\' || c == '/' ? c : '\0';
}

/* The rest of a string behind its opening quote. */
static bool llmcbi_json_string(llmcbi_json *j)
{
    const char *p = j->p, *end = j->end;

    j->str = p;
    j->escaped = j->high = false;
    for (;;) {
        unsigned char c;
        p = llmcbi_json_plain(p, end);
        if (p == end) return false;
        c = (unsigned char)*p++;
        if (c == '"') break;
        if (c < 0x20) return false;
        if (c >= 0x80) {
            j->high = true;
            while (p < end && (unsigned char)*p >= 0x80)
                p++;
        }
        if (c != '\\') continue;
        j->escaped = true;
        if (p == end) return false;
        c = (unsigned char)*p++;
        if (c == 'u') {
            if (end - p < 4 || llmcbi_hex4(p) > 0xFFFF) return false;
            p += 4;
        } else if (!llmcbi_json_unescape((char)c)) {
            return false;
        }
    }
    j->len = (size_t)(p - 1 - j->str);
    j->p = p;
    return true;
}

static const char *llmcbi_digits(const char *p, const char *end)
{
    while (p < end && *p >= '0' && *p <= '9')
        p++;
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

LLMCBI_APART static bool llmcbi_json_in_object(const llmcbi_json *j)
{
    uint32_t d = j->depth - 1;

    return (j->is_object[d / 32] >> (d % 32) & 1) != 0;
}

LLMCBI_APART static llmcbi_json_type llmcbi_json_close(llmcbi_json *j,
                                                       bool object)
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
    case '[': return llmcbi_json_open(j, *j->p++ == '{');
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
    if (*j->p++ != '"' || !llmcbi_json_string(j)) return llmcbi_json_fail(j);
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
    case LLMCBI_EXPECT_VALUE: return llmcbi_json_value(j);
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
    default: /* something behind the document */ return llmcbi_json_fail(j);
    }
}

/* Passes over what is left of the value that `type` began. */
static void llmcbi_json_skip(llmcbi_json *j, llmcbi_json_type type)
{
    uint32_t depth = j->depth;

    if (type != LLMCBI_JSON_OBJECT && type != LLMCBI_JSON_ARRAY) return;
    /* tcc makes an endless loop of a test and return in here */
    while (j->depth >= depth && type != LLMCBI_JSON_ERROR)
        type = llmcbi_json_next(j);
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
    j->str = start;
    j->len = (size_t)(j->p - start);
    if (j->p == j->end && j->expect != LLMCBI_EXPECT_END)
        return LLMCBI_JSON_ERROR;
    return type;
}

/* Whether the rest holds nothing but white space: the document is whole. */
static bool llmcbi_json_whole(llmcbi_json *j)
{
    return llmcbi_json_next(j) == LLMCBI_JSON_END;
}

/* Whether a text is one JSON value of a type. */
static bool llmcbi_json_is_one(llmcb_str s, llmcbi_json_type type)
{
    llmcbi_json j;

    llmcbi_json_init(&j, s.ptr, s.len);
    return llmcbi_json_raw(&j) == type && llmcbi_json_whole(&j);
}

/* The same of the program's text, which must be UTF-8, or NULL. */
static bool llmcbi_json_text_is(const char *text, llmcbi_json_type type)
{
    llmcb_str s = llmcb_text(text);

    return !text ||
           (llmcbi_json_is_one(s, type) && llmcbi_utf8_valid(s.ptr, s.len));
}

#if LLMCBI_QUICK
/* Decodes what is simple, whole characters and escapes that are one, moves *s
 * behind it and returns the end of the copy, which is no longer. Stops at any
 * quote, too. */
static char *llmcbi_json_copy(char *out, const char **s, const char *end)
{
    const char *p = *s;

    while (p < end) {
        unsigned char c = (unsigned char)*p;
        if (c >= 0x80) {
            size_t n = llmcbi_utf8_at(p, (size_t)(end - p));
            if (!n) break;
            while (n--)
                *out++ = *p++;
        } else if (c != '\\') {
            if (c < 0x20 || c == '"') break;
            *out++ = *p++;
        } else if (end - p >= 6 && p[1] == 'u') {
            uint32_t cp = llmcbi_hex4(p + 2);
            if (cp > 0xFFFF || (cp >= 0xD800 && cp < 0xE000)) break;
            out = llmcbi_put_utf8(out, cp);
            p += 6;
        } else {
            char meant = end - p > 1 ? llmcbi_json_unescape(p[1]) : '\0';
            if (!meant) break;
            *out++ = meant;
            p += 2;
        }
    }
    *s = p;
    return out;
}
#endif

/* Decodes the inside of a JSON string to UTF-8. Writes at most
 * 3 * len + 6 bytes and returns how many. What is incomplete at the end
 * stays in the carry. */
static size_t llmcbi_json_decode(char *out, const char *s, size_t len,
                                 llmcbi_carry *c)
{
    const char *end = s + len;
    char *o = out;

    while (s < end) {
        unsigned char b;
        uint32_t cp;
#if LLMCBI_QUICK
        if (!c->n && !c->high) {
            o = llmcbi_json_copy(o, &s, end);
            if (s == end) break;
        }
#endif
        b = (unsigned char)*s++;
        if (b != '\\') {
            if (c->high) o = llmcbi_carry_flush(o, c);
            o = llmcbi_put_byte(o, c, b);
            continue;
        }
        if (*s != 'u') {
            o = llmcbi_carry_flush(o, c);
            *o++ = llmcbi_json_unescape(*s++);
            continue;
        }
        cp = llmcbi_hex4(s + 1);
        s += 5;
        if (c->high && cp >= 0xDC00 && cp < 0xE000) {
            cp = 0x10000 + ((uint32_t)(c->high - 0xD800) << 10) + (cp - 0xDC00);
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

/* Decodes a byte or an escape at *s. */
LLMCBI_APART static size_t llmcbi_json_unit(char *out, const char **s,
                                            llmcbi_carry *c)
{
    size_t len = **s != '\\' ? 1 : (*s)[1] == 'u' ? 6 : 2;

    *s += len;
    return llmcbi_json_decode(out, *s - len, len, c);
}

/* Whether the last key or string is `text`. */
static bool llmcbi_json_is_text(const llmcbi_json *j, llmcb_str text)
{
    const char *s = j->str, *end = s + j->len;
    char plain[3 * 6 + 6];
    llmcbi_carry c;
    bool whole = false;

    if (!j->escaped) return llmcbi_str_equal(llmcbi_slice(s, j->len), text);
    memset(&c, 0, sizeof c);
    while (!whole) {
        size_t n;
        whole = s == end;
        n = whole ? (size_t)(llmcbi_carry_flush(plain, &c) - plain)
                  : llmcbi_json_unit(plain, &s, &c);
        if (n > text.len || memcmp(plain, text.ptr, n) != 0) return false;
        text = llmcbi_slice(text.ptr + n, text.len - n);
    }
    return !text.len;
}

/* The same with a literal, whose length the compiler knows. */
#define llmcbi_json_is(j, literal) \
    llmcbi_json_is_text(j, llmcbi_slice(literal, sizeof(literal) - 1))

/* The last number, if it is a whole one that fits. */
static bool llmcbi_json_int(const llmcbi_json *j, int64_t *out)
{
    const char *p = j->str, *end = p + j->len;
    bool negative = p < end && *p == '-';
    uint64_t v = 0;

    for (p += negative; p < end && *p != '.'; p++) {
        unsigned digit = (unsigned)*p - '0';
        if (digit > 9 || v > INT64_MAX / 10) return false;
        v = v * 10 + digit;
    }
    if (v > (uint64_t)INT64_MAX + negative) return false;
    for (p += p < end; p < end; p++) /* 1.0 is whole */
        if (*p != '0') return false;
    *out = negative && v ? -(int64_t)(v - 1) - 1 : (int64_t)v;
    return true;
}

/* Appends a whole string value, decoded. */
static void llmcbi_json_text(const llmcb_allocator *a, llmcbi_buf *b,
                             const llmcbi_json *j)
{
    llmcbi_carry c;

    memset(&c, 0, sizeof c);
    if (j->len > SIZE_MAX / 8) b->failed = true;
    if (!llmcbi_buf_reserve(a, b, 3 * j->len + 12)) return;
    b->len += llmcbi_json_decode(b->ptr + b->len, j->str, j->len, &c);
    b->len = (size_t)(llmcbi_carry_flush(b->ptr + b->len, &c) - b->ptr);
    b->ptr[b->len] = '\0';
}

/* The inside of a string into a small array, cut and cleaned for people. */
static void llmcbi_json_clean(char *out, size_t cap, const char *s, size_t len)
{
    const char *end = s ? s + (len < 256 ? len : 256) : NULL;
    char plain[3 * 6 + 6];
    llmcbi_carry c;

    memset(&c, 0, sizeof c);
    *out = '\0';
    while (s < end) {
        size_t n = llmcbi_json_unit(plain, &s, &c);
        llmcbi_copy_clean(out, cap, plain, n);
        if (strlen(out) < n) return;
        out += n;
        cap -= n;
    }
}

/* The inside of a JSON string. Bytes must be UTF-8. */
static void llmcbi_json_escape(const llmcb_allocator *a, llmcbi_buf *b,
                               const char *s, size_t len)
{
    static const char hex[] = "0123456789abcdef";
    size_t i, plain = 0;

    for (i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        char esc[] = "\\u0000";
        const char *meant;
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7F) continue;
        llmcbi_buf_add(a, b, s + plain, i - plain);
        plain = i + 1;
        esc[4] = hex[c >> 4];
        esc[5] = hex[c & 15];
        meant = (const char *)memchr(llmcbi_json_meant, c,
                                     sizeof llmcbi_json_meant);
        if (c && meant) esc[1] = (char)('b' + (meant - llmcbi_json_meant));
        if (c == '"' || c == '\\') esc[1] = (char)c;
        llmcbi_buf_add(a, b, esc, esc[1] == 'u' ? 6 : 2);
    }
    if (len) llmcbi_buf_add(a, b, s + plain, len - plain);
}

/* Appends a text in which %s stands for a C string, %S for a llmcb_str (given
 * as a pointer), %j and %J for the same as the inside of a JSON string, and %d
 * for an int64_t. */
static void llmcbi_buf_print(const llmcb_allocator *a, llmcbi_buf *b,
                             const char *format, ...)
{
    va_list args;

    va_start(args, format);
    for (;; format += 2) {
        size_t n = strcspn(format, "%");
        char digits[24], kind;
        const void *p;
        llmcb_str s;
        llmcbi_buf_add(a, b, format, n);
        format += n;
        if (!*format) break;
        kind = format[1];
        if (kind == 'd')
            p = llmcbi_decimal(digits, va_arg(args, int64_t));
        else
            p = va_arg(args, const void *);
        s = kind == 'S' || kind == 'J' ? *(const llmcb_str *)p
                                       : llmcb_text((const char *)p);
        if (kind == 'j' || kind == 'J')
            llmcbi_json_escape(a, b, s.ptr, s.len);
        else
            llmcbi_buf_add(a, b, s.ptr, s.len);
    }
    va_end(args);
}

/* ==== [SSE] event-stream framer ======================================== */

/* HTML's event stream: LF, CR and CRLF end a line, a blank line ends an
 * event. An event of one data line that lies whole in the input is handed
 * out in place; else its bytes are gathered. */
typedef struct llmcbi_sse {
    size_t limit;
    uint8_t bom;     /* bytes of a byte order mark seen; 3: no longer */
    bool skip_lf;    /* the last line ended in CR */
    bool in_data;    /* `held` begins with data lines */
    bool is_error;   /* "event: error" */
    bool told;       /* an event was handed out; is_error was its */
    size_t n_data;   /* bytes of those lines, joined by LF */
    llmcbi_buf held; /* they, and a line that began in earlier input */
} llmcbi_sse;

typedef enum llmcbi_sse_status {
    LLMCBI_SSE_MORE, /* the input is used up */
    LLMCBI_SSE_EVENT,
    LLMCBI_SSE_LIMIT,
    LLMCBI_SSE_NOMEM
} llmcbi_sse_status;

static void llmcbi_sse_free(const llmcb_allocator *a, llmcbi_sse *s)
{
    llmcbi_buf_free(a, &s->held);
}

/* Keeps a data line that would be lost with the input. */
static bool llmcbi_sse_gather(const llmcb_allocator *a, llmcbi_sse *s,
                              llmcb_str *here)
{
    if (here->ptr) {
        llmcbi_buf_add(a, &s->held, here->ptr, here->len);
        s->n_data = s->held.len;
        s->in_data = true;
        here->ptr = NULL;
    }
    return !s->held.failed;
}

static llmcbi_sse_status llmcbi_sse_data(const llmcb_allocator *a,
                                         llmcbi_sse *s, llmcb_str *here,
                                         llmcb_str value)
{
    bool split = s->held.len > s->n_data;
    char *at;

    if (!here->ptr && !s->in_data && !split) {
        *here = value;
        return LLMCBI_SSE_MORE;
    }
    if (!llmcbi_sse_gather(a, s, here)) return LLMCBI_SSE_NOMEM;
    if (s->n_data + 1 + value.len > s->limit) return LLMCBI_SSE_LIMIT;
    /* a line that is held has its value behind the place for it */
    if (!split && !llmcbi_buf_reserve(a, &s->held, value.len + 1))
        return LLMCBI_SSE_NOMEM;
    at = s->held.ptr + s->n_data;
    if (s->in_data) *at++ = '\n';
    if (value.len) memmove(at, value.ptr, value.len);
    s->held.len = s->n_data = (size_t)(at - s->held.ptr) + value.len;
    s->in_data = true;
    return LLMCBI_SSE_MORE;
}

/* One line without its end. LLMCBI_SSE_EVENT: *event is complete. */
static llmcbi_sse_status llmcbi_sse_line(const llmcb_allocator *a,
                                         llmcbi_sse *s, llmcb_str *here,
                                         llmcb_str line, llmcb_str *event)
{
    const char *colon;
    size_t name;
    llmcb_str value;

    if (line.len == 0) {
        *event = s->in_data ? llmcbi_slice(s->held.ptr, s->n_data) : *here;
        here->ptr = NULL;
        s->in_data = false;
        s->told = event->ptr && event->len;
        if (s->told) return LLMCBI_SSE_EVENT;
        s->is_error = false;
        return LLMCBI_SSE_MORE;
    }
    colon = (const char *)memchr(line.ptr, ':', line.len);
    name = colon ? (size_t)(colon - line.ptr) : line.len;
    value = llmcbi_slice(line.ptr + name, line.len - name);
    if (value.len) { /* the colon and at most one blank */
        size_t skip = value.len > 1 && value.ptr[1] == ' ' ? 2 : 1;
        value.ptr += skip;
        value.len -= skip;
    }
    line.len = name;
    if (llmcbi_str_is(line, "data")) return llmcbi_sse_data(a, s, here, value);
    if (llmcbi_str_is(line, "event"))
        s->is_error = llmcbi_str_is(value, "error");
    return LLMCBI_SSE_MORE;
}

/* The first end of a line in the input, or NULL. It looks at one stretch
 * after the other: in a stream without any LF the search for one would go
 * through all the rest for each line. */
LLMCBI_APART static const char *llmcbi_sse_eol(const char *p, const char *end)
{
    while (p < end) {
        size_t n = end - p < 2048 ? (size_t)(end - p) : 2048;
        const char *lf = (const char *)memchr(p, '\n', n);
        const char *cr =
            (const char *)memchr(p, '\r', lf ? (size_t)(lf - p) : n);
        if (cr || lf) return cr ? cr : lf;
        p += n;
    }
    return NULL;
}

static bool llmcbi_sse_bom(const llmcb_allocator *a, llmcbi_sse *s,
                           const char **p, const char *end)
{
    static const char bom[] = "\xEF\xBB\xBF";

    while (s->bom < 3 && *p < end) {
        if (**p != bom[s->bom]) {
            if (s->bom) llmcbi_buf_add(a, &s->held, bom, s->bom);
            s->bom = 3;
            break;
        }
        (*p)++;
        s->bom++;
    }
    return !s->held.failed;
}

/* Takes input from *p on. An event is valid until the next call, and as
 * long as the input. s->is_error belongs to it. */
LLMCBI_APART static llmcbi_sse_status
llmcbi_sse_next(const llmcb_allocator *a, llmcbi_sse *s, const char **p,
                const char *end, llmcb_str *event)
{
    llmcb_str here = { NULL, 0 }; /* the only data line so far, in the input */

    if (s->told) {
        s->told = s->is_error = false;
        s->held.len = s->n_data = 0;
    }
    if (s->bom < 3 && !llmcbi_sse_bom(a, s, p, end)) return LLMCBI_SSE_NOMEM;
    while (*p < end) {
        const char *eol;
        llmcb_str line;
        llmcbi_sse_status status;
        size_t n = s->held.len - s->n_data; /* of the line */

        if (s->skip_lf) {
            s->skip_lf = false;
            if (**p == '\n') {
                (*p)++;
                continue;
            }
        }
        eol = llmcbi_sse_eol(*p, end);
        line = llmcbi_slice(*p, (size_t)((eol ? eol : end) - *p));
        if (n + line.len > s->limit) return LLMCBI_SSE_LIMIT;
        if (n || !eol) {
            llmcbi_sse_gather(a, s, &here);
            llmcbi_buf_add(a, &s->held, line.ptr, line.len);
            if (s->held.failed) return LLMCBI_SSE_NOMEM;
            line = llmcbi_slice(s->held.ptr + s->n_data, n + line.len);
        }
        *p = eol ? eol + 1 : end;
        if (!eol) break;
        s->skip_lf = *eol == '\r';
        status = llmcbi_sse_line(a, s, &here, line, event);
        s->held.len = s->n_data;
        if (status != LLMCBI_SSE_MORE) return status;
    }
    return llmcbi_sse_gather(a, s, &here) ? LLMCBI_SSE_MORE : LLMCBI_SSE_NOMEM;
}

/* ==== [LOOP] poll set, timers, wake-up, posts, embedding =============== */

/* A place in a list; its head is a pointer. Zeroed: in none. */
typedef struct llmcbi_link {
    struct llmcbi_link *next, **at;
} llmcbi_link;

/* Something that the loop is to do in this turn. Zeroed: not queued. */
typedef struct llmcbi_ready {
    struct llmcbi_ready *prev, *next;
    void (*fn)(struct llmcbi_ready *r);
} llmcbi_ready;

/* Room in the heap is reserved when the timer is made: arming cannot fail. */
typedef struct llmcbi_timer {
    void (*fn)(struct llmcbi_timer *t);
    size_t place; /* in the heap, from 1; 0: not armed */
} llmcbi_timer;

/* A timer that is armed. */
typedef struct llmcbi_sleep {
    int64_t due;
    uint64_t seq; /* equal times expire in the order of arming */
    llmcbi_timer *timer;
} llmcbi_sleep;

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
#define LLMCBI_MAX_FIRED 128               /* descriptors served in one turn */
#define LLMCBI_MANY 256                    /* descriptors, for a rest */
#define LLMCBI_SEVERAL 4                   /* in a millisecond, likewise */
#define LLMCBI_AWAKE_MS 100
#define LLMCBI_REST_TRIAL_MS 10
#define LLMCBI_ROUNDS 8 /* of the ready list in one turn */

/* What later sections keep in the loop.
 * upward: llmcbi_pool */
typedef struct llmcbi_pool llmcbi_pool;
/* upward: llmcbi_cursor, llmcbi_away */
typedef struct llmcbi_cursor llmcbi_cursor;
typedef struct llmcbi_away llmcbi_away;
/* upward: llmcbi_job */
typedef struct llmcbi_job llmcbi_job;
/* upward: llmcbi_block */
typedef struct llmcbi_block llmcbi_block;

struct llmcb_loop {
    /* First what most code asks for, within 127 bytes, where instructions
     * that reach it are shorter. */
    llmcb_allocator alloc;
    int64_t now;
    llmcbi_ready ready; /* list head */
    bool turning;       /* inside a turn: user code may be on the stack */
    bool virtual_clock;
    bool stopping;
    bool freeing; /* awaits end at once, nothing new starts */
    bool joined;  /* no worker is left */
    bool telling; /* handlers are called, or a task that is one begins */
    bool thread_known;
    bool resting;       /* before it looks what has come */
    bool sleeping;      /* under the mutex: it waits, or its host does */
    bool closed;        /* under the mutex: no more posts */
    bool progress_due;  /* under the mutex: some of it has reached its mark */
    llmcbi_pool *pool;  /* set once, by the loop */
    llmcbi_link *ops;   /* all, done or not */
    llmcbi_link *dead;  /* siblings that were done and freed in a callback */
    size_t n_alive;     /* operations that are not done */
    llmcbi_sleep *heap; /* from 1 */
    pid_t pid;
    int epoll_fd;
    int wake_fd[2];
    llmcbi_block *spare; /* blocks of logs, for use again */
    void *scratch;       /* shared read buffer of the socket transport */

    /* Shared with other threads, under the mutex. */
    pthread_mutex_t mutex;
    llmcbi_post *posts, **last_post;
    llmcbi_job *finished;  /* blocking functions that have returned */
    llmcbi_away *progress; /* of cursors that workers have moved */
    llmcbi_away **last_progress;

    llmcb_host host;
    int64_t host_timer; /* what the host was told; -2: nothing yet */
    size_t n_timers, heap_cap, timers_made;
    uint64_t timer_seq;
    llmcbi_watch **watches;
    size_t n_watches, watches_cap;
    size_t poll_start;
    size_t unseen;      /* before timers are run; 0: all there are */
    struct pollfd *fds; /* poll(2) alone */
    size_t fds_cap;
    pthread_t thread;
    llmcbi_flag cancels; /* some op has cancel_wanted */
    int64_t shutdown_ms;
    void (*log)(void *user, const char *line);
    void *log_user;
    llmcbi_random random;
    unsigned workers;
    int pool_errno; /* why the pool has no thread: of a LLMCB_ESYS */
    size_t worker_stack;
    llmcb_transport *transports, *default_transport;
    llmcb_transport none; /* for a recording that there was no memory for */
    uint64_t last_identity;
    llmcbi_cursor *unpublished; /* whose news the pool must be told */
    llmcbi_cursor **last_unpublished;
    size_t n_spare;
    llmcb_handler **hooks; /* told of all runs */
    size_t n_hooks, hooks_cap;
    llmcb_event token; /* as inline handlers are shown one: all else is NULL */
    llmcb_chunk token_room;
    llmcbi_ready round; /* what of `ready` is run at the moment */
    int64_t counted;    /* when counting began; for rests */
    int64_t came;       /* descriptors since then */
    int64_t usual;      /* in a millisecond without rests */
    size_t found;       /* by the last wait, with the wake-up */
    size_t n_fired;
    llmcbi_fired fired[LLMCBI_MAX_FIRED];
};

LLMCBI_APART static void llmcbi_log(llmcb_loop *loop, const char *line)
{
    if (loop->log) loop->log(loop->log_user, line);
}

/* Why something could not be begun. */
static const llmcb_error *
llmcbi_error_unstarted(const llmcb_loop *loop, llmcb_code code, const char *why)
{
    llmcb_error e;

    llmcbi_error_set(&e, code, why);
    if (code == LLMCB_ESYS) e.sys_errno = loop->pool_errno;
    return llmcbi_error_keep(&loop->alloc, &e);
}

LLMCBI_APART static void llmcbi_lock(llmcb_loop *loop)
{
    pthread_mutex_lock(&loop->mutex);
}

LLMCBI_APART static void llmcbi_unlock(llmcb_loop *loop)
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

static void llmcbi_link_in(llmcbi_link **list, llmcbi_link *l)
{
    l->next = *list;
    l->at = list;
    if (l->next) l->next->at = &l->next;
    *list = l;
}

static void llmcbi_link_out(llmcbi_link *l)
{
    if (!l->at) return;
    *l->at = l->next;
    if (l->next) l->next->at = l->at;
    l->at = NULL;
}

/* An array with room for more than n, or NULL: no memory. */
LLMCBI_APART static void *llmcbi_room(llmcb_loop *loop, void *array, size_t n,
                                      size_t *cap, size_t size)
{
    size_t more = *cap + *cap / 2 + 16;

    if (n < *cap) return array;
    array = llmcbi_resize(&loop->alloc, array, *cap * size, more * size);
    if (array) *cap = more;
    return array;
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

/* User code may be called from here on, and cannot run the loop; it ends with
 * llmcbi_leave. */
LLMCBI_APART static bool llmcbi_visit(llmcb_loop *loop)
{
    bool turning = loop->turning;

    loop->turning = true;
    return turning;
}

/* The host's functions are user code too, but what they begin is found by
 * whoever calls them: llmcbi_leave would call them again. */
static void llmcbi_host_watch(llmcb_loop *loop, int fd, int events)
{
    bool turning = llmcbi_visit(loop);

    if (loop->host.watch) loop->host.watch(loop->host.user, fd, events);
    loop->turning = turning;
}

/* Outside of a turn: the host is to wait for what is new. */
static void llmcbi_host_update(llmcb_loop *loop);

static void llmcbi_make_ready(llmcb_loop *loop, llmcbi_ready *r)
{
    if (r->next) return;
    r->prev = loop->ready.prev;
    r->next = &loop->ready;
    r->prev->next = r;
    loop->ready.prev = r;
    llmcbi_host_update(loop);
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

/* -- timers: a heap in which each has four below it, so that it is flat, and
 * that holds what is compared, so that timers elsewhere are not looked at */

/* One comparison: whether times are equal is often guessed wrong. */
static bool llmcbi_sleep_before(const llmcbi_sleep *a, const llmcbi_sleep *b)
{
    return a->due < b->due + (a->seq < b->seq);
}

LLMCBI_APART static void llmcbi_heap_put(llmcb_loop *loop, llmcbi_sleep *at,
                                         const llmcbi_sleep *s)
{
    *at = *s;
    s->timer->place = (size_t)(at - loop->heap);
}

/* Finds the place of s, which begins at i. */
static void llmcbi_heap_sift(llmcb_loop *loop, size_t i, const llmcbi_sleep *s)
{
    llmcbi_sleep *heap = loop->heap, *at = heap + i, *kid, *k, *last;
    size_t n = loop->n_timers;

    for (; i > 1; at = kid) {
        kid = heap + (i + 2) / 4;
        if (!llmcbi_sleep_before(s, kid)) break;
        llmcbi_heap_put(loop, at, kid);
        i = (i + 2) / 4;
    }
    for (; 4 * i - 2 <= n; at = kid) {
        kid = k = heap + (4 * i - 2);
        last = heap + (4 * i + 1 < n ? 4 * i + 1 : n);
        while (k++ < last)
            if (llmcbi_sleep_before(k, kid)) kid = k;
        if (!llmcbi_sleep_before(kid, s)) break;
        llmcbi_heap_put(loop, at, kid);
        i = (size_t)(kid - heap);
    }
    llmcbi_heap_put(loop, at, s);
}

/* Takes out what is at i. */
static void llmcbi_heap_cut(llmcb_loop *loop, size_t i)
{
    llmcbi_sleep last = loop->heap[loop->n_timers--];

    if (i <= loop->n_timers) llmcbi_heap_sift(loop, i, &last);
}

/* Whether the first place is free: its timer is just expiring. */
static bool llmcbi_heap_vacant(const llmcb_loop *loop)
{
    return loop->n_timers && !loop->heap[1].timer;
}

static bool llmcbi_timer_init(llmcb_loop *loop, llmcbi_timer *t,
                              void (*fn)(llmcbi_timer *))
{
    llmcbi_sleep *heap = (llmcbi_sleep *)llmcbi_room(
        loop, loop->heap, loop->timers_made + 1, &loop->heap_cap, sizeof *heap);

    if (!heap) return false;
    loop->heap = heap;
    loop->timers_made++;
    memset(t, 0, sizeof *t);
    t->fn = fn;
    return true;
}

static void llmcbi_timer_stop(llmcb_loop *loop, llmcbi_timer *t)
{
    if (t->place) llmcbi_heap_cut(loop, t->place);
    t->place = 0;
}

/* fn once, ms from now; at the earliest in the next turn. */
static void llmcbi_timer_start(llmcb_loop *loop, llmcbi_timer *t, int64_t ms)
{
    llmcbi_sleep s;

    if (ms < 0) ms = 0;
    llmcbi_timer_stop(loop, t);
    /* never too early: counted from this moment and not from the turn's
     * beginning, and the clock is cut to whole milliseconds */
    s.due = loop->virtual_clock ? loop->now : llmcbi_clock_ms() + (ms > 0);
    s.due = ms < LLMCBI_LAST_MS - s.due ? s.due + ms : LLMCBI_LAST_MS;
    s.seq = ++loop->timer_seq;
    s.timer = t;
    llmcbi_heap_sift(loop, llmcbi_heap_vacant(loop) ? 1 : ++loop->n_timers, &s);
    llmcbi_host_update(loop);
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

    while (loop->n_timers && loop->heap[1].due <= loop->now &&
           loop->heap[1].seq <= last) {
        llmcbi_timer *t = loop->heap[1].timer;
        /* what it arms, often itself, takes its place at once */
        loop->heap[1].timer = NULL;
        t->place = 0;
        t->fn(t);
        if (llmcbi_heap_vacant(loop)) llmcbi_heap_cut(loop, 1);
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
LLMCBI_APART static bool llmcbi_poller_ctl(llmcb_loop *loop, int op, int fd,
                                           int events, void *ptr)
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
           llmcbi_poller_ctl(loop, EPOLL_CTL_ADD, loop->wake_fd[0], LLMCB_READ,
                             NULL);
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
        LLMCBI_FETCH(f->watch);
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
    struct pollfd *fds = (struct pollfd *)llmcbi_room(
        loop, loop->fds, loop->n_watches, &loop->fds_cap, sizeof *fds);

    (void)before;
    if (!fds) return !w->events;
    loop->fds = fds;
    llmcbi_host_watch(loop, w->fd, w->events);
    return true;
}

static void llmcbi_poller_fire(llmcb_loop *loop, llmcbi_watch *w, short revents)
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

    if (n)
        loop->poll_start =
            (loop->poll_start + (loop->unseen ? LLMCBI_MAX_FIRED : 1)) % n;
    for (i = 0; i < n + 1 && i < cap; i++) {
        fds[i].fd = loop->wake_fd[0];
        fds[i].events = POLLIN;
        fds[i].revents = 0;
        if (i) {
            llmcbi_watch *w = loop->watches[(loop->poll_start + i - 1) % n];
            fds[i].fd = w->fd;
            fds[i].events = (short)((w->events & LLMCB_READ ? POLLIN : 0) |
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

static bool llmcbi_watch_add(llmcb_loop *loop, llmcbi_watch *w)
{
    llmcbi_watch **list = (llmcbi_watch **)llmcbi_room(
        loop, loop->watches, loop->n_watches, &loop->watches_cap, sizeof *list);

    if (!list) return false;
    loop->watches = list;
    list[loop->n_watches] = w;
    w->place = ++loop->n_watches;
    return true;
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

/* Watches w->fd for events; 0 ends it. Must be told before that is closed. */
static llmcb_code llmcbi_watch_set(llmcb_loop *loop, llmcbi_watch *w,
                                   int events)
{
    int before = w->events;
    bool ok;

    if (events == before) return LLMCB_OK;
    if (!before && !llmcbi_watch_add(loop, w)) return LLMCB_ENOMEM;
    w->events = events;
    ok = llmcbi_poller_set(loop, w, before);
    if (!ok) w->events = before;
    if (!w->events) llmcbi_watch_remove(loop, w);
    return ok ? LLMCB_OK : LLMCBI_EPOLL ? LLMCB_ESYS : LLMCB_ENOMEM;
}

/* Timers come behind what is ready: what is there already is not late, however
 * long the program let the loop wait. Of more than is told in one turn, as many
 * turns behind it as that takes. */
static bool llmcbi_looked_at_all(llmcb_loop *loop, bool woken)
{
    size_t left = loop->unseen ? loop->unseen : loop->n_watches;
    size_t most = LLMCBI_MAX_FIRED - 1; /* a wake-up may take a place */
    bool all = loop->n_fired + woken <= most || left <= most;

    loop->unseen = all ? 0 : left - most;
    return all;
}

static void llmcbi_run_fired(llmcb_loop *loop)
{
    size_t i;

    for (i = 0; i < loop->n_fired; i++) {
        llmcbi_fired f = loop->fired[i];
        loop->fired[i].watch = NULL;
        if (!f.watch || (f.events &= f.watch->events) == 0) continue;
        f.watch->fn(f.watch, f.events);
        llmcbi_run_ready(loop); /* what was read is in the cache still */
    }
    loop->n_fired = 0;
}

/* -- wake-up and posts */

LLMCBI_DEF void llmcb_loop_wakeup(llmcb_loop *loop)
{
    int saved = errno;
    ssize_t n;

    if (!loop) return;
    do
        n = LLMCBI_SYS(write)(loop->wake_fd[1], "", 1);
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

    do
        n = LLMCBI_SYS(read)(loop->wake_fd[0], junk, sizeof junk);
    while (n == (ssize_t)sizeof junk || (n < 0 && errno == EINTR));
}

LLMCBI_DEF llmcb_code llmcb_loop_post(llmcb_loop *loop, void (*fn)(void *arg),
                                      void *arg)
{
    llmcbi_post *p;
    bool closed;

    if (!loop) return LLMCB_ENOMEM;
    if (!fn) return LLMCB_EINVAL;
    if (loop->pid != getpid()) return LLMCB_EFORK;
    p = (llmcbi_post *)llmcbi_alloc(&loop->alloc, sizeof *p);
    if (!p) return LLMCB_ENOMEM;
    p->fn = fn;
    p->arg = arg;
    llmcbi_lock(loop);
    closed = loop->closed;
    if (!closed) {
        *loop->last_post = p;
        loop->last_post = &p->next;
        llmcbi_wake_sleeper(loop);
    }
    llmcbi_unlock(loop);
    if (!closed) return LLMCB_OK;
    llmcbi_free(&loop->alloc, p, sizeof *p);
    return LLMCB_ESTATE;
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
static void llmcbi_take_jobs(llmcb_loop *loop, llmcbi_job *job);
/* upward: llmcbi_pool_idle */
static bool llmcbi_pool_idle(const llmcb_loop *loop);
/* upward: llmcbi_hear_progress, llmcbi_take_back */
static llmcbi_away *llmcbi_hear_progress(llmcb_loop *loop);
static void llmcbi_take_back(llmcbi_away *w);
/* upward: llmcbi_publish */
static void llmcbi_publish(llmcb_loop *loop);
/* upward: llmcbi_bury */
static void llmcbi_bury(llmcb_loop *loop);

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
        ms = loop->heap[1].due - loop->now;
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
            loop->now = loop->heap[1].due;
            llmcbi_unlock(loop);
            return 0;
        }
        ms = -1; /* only something real can happen first */
    }
    loop->sleeping = true;
    llmcbi_unlock(loop);
    return ms < INT_MAX ? ms : INT_MAX; /* poll takes no more */
}

static void llmcbi_process(llmcb_loop *loop, bool woken)
{
    llmcbi_post *posts;
    llmcbi_job *finished;
    llmcbi_away *back;
    bool all;

    loop->turning = true;
    if (woken) llmcbi_drain_wakeups(loop);
    /* in one go: what a worker posted must be seen before it is known that
     * it is done */
    llmcbi_lock(loop);
    loop->sleeping = false;
    loop->progress_due = false;
    posts = llmcbi_take_posts(loop);
    finished = loop->finished;
    loop->finished = NULL;
    back = llmcbi_hear_progress(loop);
    llmcbi_unlock(loop);
    if (!loop->virtual_clock) loop->now = llmcbi_clock_ms();
    llmcbi_run_posts(loop, posts);
    llmcbi_take_cancels(loop);
    llmcbi_take_jobs(loop, finished);
    llmcbi_take_back(back);
    all = llmcbi_looked_at_all(loop, woken);
    llmcbi_run_fired(loop);
    if (all) llmcbi_run_timers(loop);
    llmcbi_run_ready(loop);
    llmcbi_bury(loop);
    llmcbi_publish(loop);
    loop->turning = false;
}

#if LLMCBI_QUICK
/* Waits up to ms. Where hundreds of streams tick, a wake-up for every token or
 * two costs more than reading them: there the loop rests for a millisecond, or
 * until a thread wakes it, before it looks for all. Who waits for an answer
 * before he asks again would come less often for that, so what comes is counted
 * with and without, and a rest that costs half of it ends. */
static bool llmcbi_wait(llmcb_loop *loop, int ms)
{
    struct pollfd wake = { 0, POLLIN, 0 };
    int64_t past;
    bool woken;

    wake.fd = loop->wake_fd[0];
    if (ms && loop->resting && loop->found < LLMCBI_MAX_FIRED) {
        if (LLMCBI_SYS(poll)(&wake, 1, 1) < 0)
            ms = 0; /* a signal ends any wait */
        else if (ms > 0)
            ms--;
    }
    woken = llmcbi_poller_wait(loop, ms);
    loop->found = loop->n_fired + woken;
    loop->came += (int64_t)loop->n_fired;
    past = loop->now - loop->counted;
    if (past >= (loop->resting ? LLMCBI_REST_TRIAL_MS : LLMCBI_AWAKE_MS)) {
        int64_t rate = loop->came / past; /* in a millisecond */
        bool pays = !loop->resting || 2 * rate >= loop->usual;
        if (!loop->resting) loop->usual = rate;
        loop->resting =
            pays && loop->n_watches >= LLMCBI_MANY && rate >= LLMCBI_SEVERAL;
        loop->came = 0;
        loop->counted = loop->now;
    }
    return woken;
}
#else
static bool llmcbi_wait(llmcb_loop *loop, int ms)
{
    return llmcbi_poller_wait(loop, ms);
}
#endif

static void llmcbi_turn(llmcb_loop *loop, int64_t max_ms)
{
    int64_t ms = llmcbi_prepare(loop);

    if (max_ms >= 0 && (ms < 0 || ms > max_ms))
        ms = max_ms < INT_MAX ? max_ms : INT_MAX;
    llmcbi_process(loop, llmcbi_wait(loop, (int)ms));
    llmcbi_host_update(loop);
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
    while (loop->n_alive && !loop->stopping)
        llmcbi_turn(loop, -1);
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
    if (ms < 0 || ms > LLMCBI_LAST_MS - loop->now) return LLMCB_EINVAL;
    loop->now += ms;
    llmcbi_host_update(loop);
    return LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_loop_prepare(llmcb_loop *loop, int64_t *timeout_ms)
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

static void llmcbi_host_timer(llmcb_loop *loop, int64_t ms)
{
    bool turning = llmcbi_visit(loop);

    if (loop->host.timer) loop->host.timer(loop->host.user, ms);
    loop->turning = turning;
}

static void llmcbi_host_update(llmcb_loop *loop)
{
    int64_t ms;

    if (!loop->host.timer || loop->turning) return;
    do { /* once more if the host itself has begun something */
        ms = llmcbi_prepare(loop);
        if (ms < 0 && loop->host_timer == -1) return;
        loop->host_timer = ms;
        llmcbi_host_timer(loop, ms);
    } while (ms != 0 && llmcbi_prepare(loop) == 0);
}

static void llmcbi_leave(llmcb_loop *loop, bool turning)
{
    loop->turning = turning;
    llmcbi_host_update(loop);
}

/* Has the host watch all that the loop does, or forget it. */
static void llmcbi_host_watch_all(llmcb_loop *loop, bool all)
{
    size_t i;

    llmcbi_host_watch(loop, LLMCBI_EPOLL ? loop->epoll_fd : loop->wake_fd[0],
                      all ? LLMCB_READ : 0);
    for (i = 0; i < loop->n_watches && !LLMCBI_EPOLL; i++)
        llmcbi_host_watch(loop, loop->watches[i]->fd,
                          all ? loop->watches[i]->events : 0);
}

LLMCBI_DEF llmcb_code llmcb_loop_set_host(llmcb_loop *loop,
                                          const llmcb_host *host)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (code != LLMCB_OK) return code;
    if (host && (!host->watch || !host->timer)) return LLMCB_EINVAL;
    llmcbi_host_timer(loop, -1);
    llmcbi_host_watch_all(loop, false);
    memset(&loop->host, 0, sizeof loop->host);
    if (host) loop->host = *host;
    llmcbi_host_watch_all(loop, true);
    loop->host_timer = -2;
    llmcbi_host_update(loop);
    return LLMCB_OK;
}

/* A turn for a host, which has waited: all that is ready, whatever the host
 * says. Others come before their timers, and what was told already is not told
 * twice. */
static llmcb_code llmcbi_host_turn(llmcb_loop *loop, bool timer)
{
    llmcb_code code = llmcbi_may_turn(loop);

    if (code != LLMCB_OK) return code;
    if (timer) loop->host_timer = -1; /* it was a one-shot */
    llmcbi_process(loop, llmcbi_poller_wait(loop, 0));
    llmcbi_host_update(loop);
    return LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_loop_fd_event(llmcb_loop *loop, int fd, int events)
{
    (void)fd;
    (void)events;
    return llmcbi_host_turn(loop, false);
}

LLMCBI_DEF llmcb_code llmcb_loop_timer_event(llmcb_loop *loop)
{
    return llmcbi_host_turn(loop, true);
}

LLMCBI_DEF llmcb_code llmcb_loop_dispatch(llmcb_loop *loop,
                                          const struct pollfd *fds, size_t n)
{
#if LLMCBI_EPOLL
    (void)fds;
    (void)n;
    return llmcbi_host_turn(loop, false);
#else
    llmcb_code code = llmcbi_may_turn(loop);

    if (code != LLMCB_OK) return code;
    llmcbi_process(loop, llmcbi_poller_take(loop, fds, fds ? n : 0));
    return LLMCB_OK;
#endif
}

/* -- life */

LLMCBI_DEF llmcb_loop *llmcb_loop_new(const llmcb_loop_desc *desc)
{
    static const llmcb_loop_desc none = { { NULL, NULL }, 0,   0, false, 0,
                                          NULL,           NULL };
    llmcb_loop *loop;
    llmcb_allocator a;

    if (!desc) desc = &none;
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
    loop->shutdown_ms =
        desc->shutdown_ms > 0 ? llmcbi_span(desc->shutdown_ms) : 5000;
    loop->workers = desc->workers ? desc->workers : 4;
    if (loop->workers < 2) loop->workers = 2;
    if (loop->workers > 64) loop->workers = 64;
    loop->worker_stack =
        desc->worker_stack ? desc->worker_stack : (size_t)256 * 1024;
    loop->virtual_clock = desc->virtual_clock;
    loop->now = desc->virtual_clock ? 0 : llmcbi_clock_ms();
    loop->pid = getpid();
    loop->last_post = &loop->posts;
    loop->last_unpublished = &loop->unpublished;
    loop->last_progress = &loop->progress;
    loop->epoll_fd = -1;
    llmcbi_list_init(&loop->ready);
    llmcbi_random_seed(&loop->random);
    if (LLMCBI_SYS(pipe)(loop->wake_fd) != 0) goto no_pipe;
    if (!llmcbi_cloexec_nonblock(loop->wake_fd[0]) ||
        !llmcbi_cloexec_nonblock(loop->wake_fd[1]) || !llmcbi_poller_open(loop))
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

typedef struct llmcbi_task llmcbi_task;

/* One task that awaits one op. */
typedef struct llmcbi_waiter {
    llmcbi_link link; /* of the op's */
    llmcb_op *op;
    llmcbi_task *task;
} llmcbi_waiter;

/* What an operation is. */
typedef struct llmcbi_op_kind {
    /* Bring it to its end, now or later. */
    void (*cancel)(llmcb_op *op, llmcb_detail detail);
    /* It is done and nobody holds it. */
    void (*destroy)(llmcb_op *op);
    /* Somebody waits for its end and not for its parts; may be NULL. */
    void (*waited)(llmcb_op *op);
    void (*begin)(llmcb_op *op); /* the parent is open; may be NULL */
    /* NULL for what has none. */
    void (*child_done)(llmcb_op *op, llmcb_op *child);
} llmcbi_op_kind;

struct llmcb_op {
    llmcbi_link sibling; /* of the parent's children; first, so that one of
                            them is the op itself */
    llmcbi_link all;     /* of the loop's */
    llmcb_loop *loop;
    const llmcbi_op_kind *kind;
    /* A tree: what is under way within an op. It ends before that op does,
     * and begins when that is open. */
    llmcb_op *parent;
    llmcbi_link *children;
    llmcb_run *run;           /* its first; may be NULL */
    llmcb_op *answer;         /* the op whose result it shows, if not its own */
    const llmcb_usage *usage; /* likewise; NULL: its own */
    const llmcb_output *output; /* of its run, if that is no model's */
    llmcbi_link *waiters;
    llmcbi_task *reader;      /* awaits a chunk */
    const llmcb_error *error; /* of a done op */
    bool open;                /* children may begin */
    bool done;
    bool detached; /* the program has freed it */
    bool waiting;  /* the loop runs on its behalf: not to be destroyed */
    llmcbi_flag cancel_wanted; /* the detail of it */
};

/* A new operation in so many bytes, all else zeroed. */
static llmcb_op *llmcbi_op_new(llmcb_loop *loop, size_t size,
                               const llmcbi_op_kind *kind)
{
    llmcb_op *op = (llmcb_op *)llmcbi_alloc(&loop->alloc, size);

    if (!op) return NULL;
    op->loop = loop;
    op->kind = kind;
    llmcbi_link_in(&loop->ops, &op->all);
    loop->n_alive++;
    return op;
}

static void llmcbi_op_destroy(llmcb_op *op)
{
    llmcbi_link_out(&op->all);
    llmcbi_error_drop(&op->loop->alloc, op->error);
    op->kind->destroy(op);
}

/* Destroys what was freed inside a callback. */
static void llmcbi_bury(llmcb_loop *loop)
{
    while (loop->dead) {
        llmcb_op *op = LLMCBI_OWNER(llmcb_op, sibling, loop->dead);
        llmcbi_link_out(&op->sibling);
        llmcbi_op_destroy(op);
    }
}

/* Makes `child` a part of op until it is done. */
static void llmcbi_op_adopt(llmcb_op *op, llmcb_op *child)
{
    child->parent = op;
    llmcbi_link_in(&op->children, &child->sibling);
}

static void llmcbi_op_leave(llmcb_op *child)
{
    llmcb_op *op = child->parent;

    if (!op) return;
    llmcbi_link_out(&child->sibling);
    child->parent = NULL;
    op->kind->child_done(op, child);
}

/* Has op cancelled in the next turn. */
static void llmcbi_op_want_cancel(llmcb_op *op, llmcb_detail detail)
{
    LLMCBI_FLAG_SET(&op->cancel_wanted, detail);
    LLMCBI_FLAG_SET(&op->loop->cancels, 1);
}

static void llmcbi_task_told(llmcbi_waiter *w);
static void llmcbi_task_wake(llmcbi_task *t, llmcb_code result);

/* The end of op, with an error that it then owns. May destroy op. */
static void llmcbi_op_finish(llmcb_op *op, const llmcb_error *error)
{
    op->error = error;
    op->done = true;
    op->loop->n_alive--;
    llmcbi_op_leave(op);
    if (op->reader) llmcbi_task_wake(op->reader, LLMCB_OK);
    while (op->waiters)
        llmcbi_task_told((llmcbi_waiter *)(void *)op->waiters);
    if (op->detached && !op->waiting) llmcbi_op_destroy(op);
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
    llmcbi_op_want_cancel(op, LLMCB_DETAIL_CALLER);
    llmcb_loop_wakeup(op->loop);
}

static void llmcbi_take_cancels(llmcb_loop *loop)
{
    llmcbi_link *l, *next;

    if (!LLMCBI_FLAG_GET(&loop->cancels)) return;
    LLMCBI_FLAG_SET(&loop->cancels, 0);
    for (l = loop->ops; l; l = next) {
        llmcb_op *op = LLMCBI_OWNER(llmcb_op, all, l);
        unsigned char detail = LLMCBI_FLAG_GET(&op->cancel_wanted);
        next = l->next; /* cancel destroys no other op */
        if (!detail) continue;
        LLMCBI_FLAG_SET(&op->cancel_wanted, 0);
        if (!op->done) op->kind->cancel(op, (llmcb_detail)detail);
    }
}

LLMCBI_DEF void llmcb_op_free(llmcb_op *op)
{
    llmcb_loop *loop;

    if (!op) return;
    loop = op->loop;
    op->detached = true;
    if (op->done) {
        if (op->waiting) return;
        if (loop->turning) /* somebody further up may be in its memory */
            llmcbi_link_in(&loop->dead, &op->sibling);
        else
            llmcbi_op_destroy(op);
        return;
    }
    if (op->reader) llmcbi_task_wake(op->reader, LLMCB_ECANCELLED);
    while (op->waiters)
        llmcbi_task_told((llmcbi_waiter *)(void *)op->waiters);
    llmcbi_op_want_cancel(op, LLMCB_DETAIL_CONSUMER);
    llmcbi_host_update(loop);
}

/* The end of op->waiting. Whether op is still there. */
static bool llmcbi_op_waited(llmcb_op *op)
{
    op->waiting = false;
    if (!op->detached || !op->done) return true;
    llmcbi_op_destroy(op);
    return false;
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
    if (op->kind->waited) op->kind->waited(op);
    loop->stopping = false;
    op->waiting = true; /* a callback may free it */
    while (!op->done && !loop->stopping)
        llmcbi_turn(loop, -1);
    code = llmcb_op_code(op);
    llmcbi_op_waited(op);
    return code;
}

LLMCBI_DEF llmcb_code llmcb_op_wait(llmcb_op *op)
{
    return op ? llmcb_loop_run_until(op->loop, op) : LLMCB_ENOMEM;
}

/* A coroutine, of an op or of a handler. */
struct llmcbi_task {
    llmcb_task pub;
    llmcb_loop *loop;
    bool armed;      /* suspended, or about to be */
    bool any;        /* one of `many` is enough */
    bool timing_out; /* the timer is a limit, not the thing awaited */
    bool cancelled;  /* told at the next await */
    llmcb_step (*step)(llmcbi_task *t);              /* calls the function */
    void (*finish)(llmcbi_task *t, llmcb_code code); /* it has ended */
    llmcbi_waiter *many; /* of llmcb_await_all and llmcb_await_any */
    size_t n_many, n_left;
    llmcb_op *owned;    /* freed when the await ends */
    llmcbi_task **slot; /* where it waits for a chunk, or for handlers */
    llmcbi_timer timer;
    llmcbi_ready ready;
    llmcbi_waiter waiter;
    llmcbi_watch watch;
    size_t size;          /* of a handler's task, with its frame */
    void *owner;          /* for step and finish */
    const llmcb_op *home; /* what it is, or whose handler it is */
};

static void llmcbi_waiter_join(llmcbi_waiter *w, llmcbi_task *t, llmcb_op *op)
{
    w->task = t;
    w->op = op;
    llmcbi_link_in(&op->waiters, &w->link);
    if (op->kind->waited) op->kind->waited(op);
}

static void llmcbi_task_disarm(llmcbi_task *t)
{
    size_t i;

    llmcbi_timer_stop(t->loop, &t->timer);
    llmcbi_watch_set(t->loop, &t->watch, 0);
    llmcbi_link_out(&t->waiter.link);
    for (i = 0; i < t->n_many; i++)
        llmcbi_link_out(&t->many[i].link);
    llmcbi_free(&t->loop->alloc, t->many, t->n_many * sizeof *t->many);
    t->many = NULL;
    t->n_many = 0;
    if (t->slot) *t->slot = NULL;
    t->slot = NULL;
    if (t->owned) {
        llmcb_op *op = t->owned;
        t->owned = NULL;
        if (op->done)
            op->detached = true; /* its finish destroys it */
        else
            llmcb_op_free(op);
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
    llmcbi_task *t = LLMCBI_OWNER(llmcbi_task, timer, timer);

    llmcbi_task_wake(t, t->timing_out ? LLMCB_ETIMEDOUT : LLMCB_OK);
}

static void llmcbi_task_watch(llmcbi_watch *watch, int events)
{
    llmcbi_task *t = LLMCBI_OWNER(llmcbi_task, watch, watch);

    (void)events;
    llmcbi_task_wake(t, LLMCB_OK);
}

/* The code of an op that a waiter was told of; one that was freed under way
 * counts as cancelled. */
static llmcb_code llmcbi_awaited_code(const llmcb_op *op)
{
    return op && op->done ? op->error->code : LLMCB_ECANCELLED;
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
    llmcbi_link_out(&w->link);
    if (code != LLMCB_OK && (size_t)(w - t->many) < t->pub.index) {
        t->pub.index = (size_t)(w - t->many);
        t->pub.result = code;
    }
    if (--t->n_left == 0) llmcbi_task_wake(t, t->pub.result);
}

static void llmcbi_task_run(llmcbi_ready *r)
{
    llmcbi_task *t = LLMCBI_OWNER(llmcbi_task, ready, r);
    llmcb_step step;

    t->armed = false;
    step = t->step(t);
    if (t->armed) {
        if (step == LLMCB_WAIT) return;
        llmcbi_unready(&t->ready); /* it ends while it waits */
        llmcbi_task_disarm(t);
    }
    /* more than 0: it says that it waits, but for nothing */
    t->finish(t, step > 0 ? LLMCB_ESTATE : llmcbi_code_of(step));
}

LLMCBI_APART static bool llmcbi_task_init(llmcb_loop *loop, llmcbi_task *t)
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

/* The beginning of every await. NULL: it has ended already, or never began. */
static llmcbi_task *llmcbi_await(llmcb_task *pub)
{
    llmcbi_task *t = (llmcbi_task *)(void *)pub;

    if (!t) return NULL;
    llmcbi_task_disarm(t);
    llmcbi_unready(&t->ready); /* an await that was given up for this one */
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

LLMCBI_DEF llmcb_step llmcb_sleep(llmcb_task *t, int64_t ms)
{
    llmcbi_task *task = llmcbi_await(t);

    if (task && ms != LLMCB_FOREVER)
        llmcbi_timer_start(task->loop, &task->timer, ms);
    return LLMCB_WAIT;
}

LLMCBI_DEF llmcb_step llmcb_await_fd(llmcb_task *t, int fd, int events,
                                     int64_t timeout_ms)
{
    llmcbi_task *task = llmcbi_await(t);
    llmcb_code code;
    size_t i;

    if (!task) return LLMCB_WAIT;
    if (fd < 0 || !events || events & ~(LLMCB_READ | LLMCB_WRITE))
        return llmcbi_await_over(task, LLMCB_EINVAL);
    for (i = 0; i < task->loop->n_watches; i++)
        if (task->loop->watches[i]->fd == fd)
            return llmcbi_await_over(task, LLMCB_EBUSY);
    task->watch.fd = fd;
    code = llmcbi_watch_set(task->loop, &task->watch, events);
    /* epoll refuses what is always ready: files */
    if (code == LLMCB_ESYS && errno == EPERM)
        code = LLMCB_OK;
    else if (code == LLMCB_OK) {
        llmcbi_await_limit(task, timeout_ms);
        return LLMCB_WAIT;
    }
    return llmcbi_await_over(task, code);
}

/* Whether op, or its run, cannot begin before t has ended: t is a handler of
 * what it is part of, and that is not open yet. */
static bool llmcbi_withheld_by(const llmcbi_task *t, const llmcb_op *op)
{
    for (; op && op->parent; op = op->parent)
        if (op->parent == t->home) return !op->parent->open;
    return false;
}

/* Why op cannot be awaited by t, or LLMCB_OK. */
static llmcb_code llmcbi_awaitable(const llmcbi_task *t, const llmcb_op *op)
{
    const llmcb_op *home = t->home;

    if (!op) return LLMCB_ENOMEM;
    if (op->loop != t->loop) return LLMCB_EINVAL;
    if (llmcbi_withheld_by(t, op)) return LLMCB_ESTATE;
    while (home && home != op) /* it cannot end before what is part of it */
        home = home->parent;
    return home ? LLMCB_ESTATE : LLMCB_OK;
}

LLMCBI_DEF llmcb_step llmcb_await(llmcb_task *t, llmcb_op *op)
{
    llmcbi_task *task = llmcbi_await(t);
    llmcb_code code;

    if (!task) return LLMCB_WAIT;
    code = llmcbi_awaitable(task, op);
    if (code != LLMCB_OK) return llmcbi_await_over(task, code);
    if (op->done) return llmcbi_await_over(task, op->error->code);
    llmcbi_waiter_join(&task->waiter, task, op);
    return LLMCB_WAIT;
}

static llmcb_step llmcbi_await_many(llmcb_task *pub, llmcb_op *const *ops,
                                    size_t n, int64_t timeout_ms, bool any)
{
    llmcbi_task *t;
    llmcb_code code = LLMCB_OK, bad;
    size_t i, first = n, left = 0;

    if (pub) pub->index = n; /* a cancel may have come before */
    t = llmcbi_await(pub);
    if (!t) return LLMCB_WAIT;
    if (n && !ops) return llmcbi_await_over(t, LLMCB_EINVAL);
    for (i = 0; i < n; i++) {
        bad = llmcbi_awaitable(t, ops[i]);
        t->pub.index = i;
        if (bad != LLMCB_OK) return llmcbi_await_over(t, bad);
        if (!ops[i]->done) {
            left++;
        } else if (first == n && (any || ops[i]->error->code != LLMCB_OK)) {
            first = i;
            code = ops[i]->error->code;
        }
    }
    t->pub.index = first;
    if (left == 0 || (any && first < n)) return llmcbi_await_over(t, code);
    t->many =
        (llmcbi_waiter *)llmcbi_alloc(&t->loop->alloc, n * sizeof *t->many);
    if (!t->many) return llmcbi_await_over(t, LLMCB_ENOMEM);
    t->any = any;
    t->n_many = n;
    t->n_left = left;
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

LLMCBI_DEF llmcb_step llmcb_await_blocking(llmcb_task *t, int (*fn)(void *arg),
                                           void *arg)
{
    llmcbi_task *task = llmcbi_await(t);
    llmcb_op *op;

    if (!task) return LLMCB_WAIT;
    if (!fn) return llmcbi_await_over(task, LLMCB_EINVAL);
    op = llmcb_offload(task->loop, fn, arg);
    if (!op) return llmcbi_await_over(task, LLMCB_ENOMEM);
    if (op->done) {
        llmcb_code code = op->error->code;
        llmcb_op_free(op);
        return llmcbi_await_over(task, code);
    }
    llmcbi_waiter_join(&task->waiter, task, op);
    task->owned = op;
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
    return LLMCBI_OWNER(llmcbi_task_op, task, t);
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

    llmcbi_task_disarm(&o->task); /* one that a freed loop gave up on */
    llmcbi_timer_free(op->loop, &o->task.timer);
    llmcbi_free(&op->loop->alloc, o, o->size);
}

static const llmcbi_op_kind llmcbi_task_kind = { llmcbi_task_op_cancel,
                                                 llmcbi_task_op_destroy, NULL,
                                                 NULL, NULL };

LLMCBI_DEF llmcb_op *llmcb_task_start(llmcb_loop *loop, llmcb_task_fn fn,
                                      size_t frame_size, void *self)
{
    llmcbi_task_op *o;
    size_t head = LLMCBI_ALIGN(sizeof *o), size = head + frame_size;

    if (llmcbi_enter(loop) != LLMCB_OK || !fn || loop->freeing || size < head)
        return NULL;
    o = (llmcbi_task_op *)(void *)llmcbi_op_new(loop, size, &llmcbi_task_kind);
    if (!o) return NULL;
    o->size = size;
    o->fn = fn;
    o->task.step = llmcbi_task_op_step;
    o->task.finish = llmcbi_task_op_finish;
    o->task.home = &o->op;
    o->task.pub.self = self;
    if (frame_size) o->task.pub.frame = (char *)o + head;
    if (!llmcbi_task_init(loop, &o->task)) {
        o->op.detached = true;
        llmcbi_op_finish(&o->op, NULL);
        return NULL;
    }
    llmcbi_make_ready(loop, &o->task.ready);
    return &o->op;
}

/* ==== [EXEC] thread pool, strands, offload ============================= */

/* A blocking function on its way through the pool. It outlives its op. */
struct llmcbi_job {
    llmcbi_job *next;
    int (*fn)(void *arg);
    void *arg;
    int result;
    llmcb_loop *loop;
    void (*done)(llmcbi_job *job); /* on the loop's thread */
    void *owner;                   /* for done; NULL: gone */
};

/* upward: llmcbi_away */
/* Work that must not run twice at a time: the calls of one handler. Queued
 * on the pool while it has cursors to serve. */
typedef struct llmcbi_strand {
    struct llmcbi_strand *next; /* in the pool's queue */
    /* cursors with events to run; behind the urgent ones, and behind all */
    llmcbi_away *first, **urgent, **last;
    bool queued; /* or running */
    const llmcb_handler *handler;
    size_t users;                     /* cursors that belong to it */
    struct llmcbi_strand *next_known; /* in the pool's list */
} llmcbi_strand;

struct llmcbi_pool {
    pthread_cond_t cond;
    unsigned n_threads, n_idle, n_exited;
    unsigned n_strands, n_jobs; /* threads that run one of them */
    bool napping;               /* one thread will look for work by itself */
    bool stop;
    llmcbi_job *jobs, **last_job;
    llmcbi_strand *strands, **urgent_strand, **last_strand;
    llmcbi_strand *known;
    pthread_t threads[64];
};

/* Under the mutex. */
static bool llmcbi_pool_idle(const llmcb_loop *loop)
{
    const llmcbi_pool *p = loop->pool;

    return !p || (!p->strands && !p->jobs && !loop->finished && !p->n_strands &&
                  !p->n_jobs);
}

/* Runs some events of a strand; called and returns with the mutex held.
 * upward: llmcbi_strand_run */
static void llmcbi_strand_run(llmcb_loop *loop, llmcbi_strand *s);

typedef enum llmcbi_due {
    LLMCBI_DUE_NONE,
    LLMCBI_DUE_STRAND,
    LLMCBI_DUE_JOB
} llmcbi_due;

/* Each kind of work leaves one thread to the other. */
static llmcbi_due llmcbi_pool_due(const llmcbi_pool *p)
{
    unsigned most = p->n_threads > 1 ? p->n_threads - 1 : 1;

    if (p->strands && p->n_strands < most) return LLMCBI_DUE_STRAND;
    return p->jobs && p->n_jobs < most ? LLMCBI_DUE_JOB : LLMCBI_DUE_NONE;
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
    job->next = loop->finished;
    loop->finished = job;
    loop->progress_due = true;
    llmcbi_wake_sleeper(loop);
}

/* A thread that has just had work sleeps two milliseconds, longer than the loop
 * rests, before it waits to be woken: where tokens come all the time, a wake-up
 * for each turn of the loop costs more than all the rest. What the loop itself
 * waits for does not wait for that, another thread is woken. */
static bool llmcbi_worker_nap(llmcb_loop *loop, llmcbi_pool *p)
{
    struct timespec nap = { 0, 2000000 };

    if (p->napping || p->n_threads < 2 || loop->virtual_clock) return false;
    p->napping = true;
    llmcbi_unlock(loop);
    nanosleep(&nap, NULL);
    llmcbi_lock(loop);
    p->napping = false;
    return true;
}

static void *llmcbi_worker(void *arg)
{
    llmcb_loop *loop = (llmcb_loop *)arg;
    llmcbi_pool *p = loop->pool;
    bool worked = false;

    llmcbi_lock(loop);
    for (;;) {
        llmcbi_due due = llmcbi_pool_due(p);
        if (due == LLMCBI_DUE_NONE) {
            if (p->stop) break;
            if (worked) {
                worked = false;
                if (llmcbi_worker_nap(loop, p)) continue;
            }
            p->n_idle++;
            pthread_cond_wait(&p->cond, &loop->mutex);
            p->n_idle--;
            continue;
        }
        worked = true;
        if (due == LLMCBI_DUE_STRAND) {
            llmcbi_strand *s = p->strands;
            p->strands = s->next;
            if (p->urgent_strand == &s->next) p->urgent_strand = &p->strands;
            if (p->last_strand == &s->next) p->last_strand = &p->strands;
            p->n_strands++;
            /* a woken worker wakes the next */
            if (p->n_idle && llmcbi_pool_due(p) != LLMCBI_DUE_NONE)
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
static llmcb_code llmcbi_pool_start(llmcb_loop *loop)
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
        p->urgent_strand = p->last_strand = &p->strands;
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
    loop->pool_errno = p->n_threads ? 0 : failed;
    return p->n_threads ? LLMCB_OK : LLMCB_ESYS;
}

static llmcbi_job *llmcbi_job_start(llmcb_loop *loop, int (*fn)(void *arg),
                                    void *arg, void (*done)(llmcbi_job *),
                                    void *owner, llmcb_code *code)
{
    llmcbi_pool *p;
    llmcbi_job *job;

    *code = llmcbi_pool_start(loop);
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

/* Frees a job that has not begun. false: it has. */
static bool llmcbi_job_withdraw(llmcb_loop *loop, llmcbi_job *job)
{
    llmcbi_pool *p = loop->pool;
    llmcbi_job **at;
    bool waits;

    llmcbi_lock(loop);
    for (at = &p->jobs; *at && *at != job; at = &(*at)->next)
        continue;
    waits = *at != NULL;
    if (waits) {
        *at = job->next;
        if (!*at) p->last_job = at;
    }
    llmcbi_unlock(loop);
    if (waits) llmcbi_free(&loop->alloc, job, sizeof *job);
    return waits;
}

/* Tells the owners of finished jobs. */
static void llmcbi_take_jobs(llmcb_loop *loop, llmcbi_job *job)
{
    llmcbi_job *next, *in_order = NULL;

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
    llmcbi_op_finish(&o->op, llmcbi_error_const(llmcbi_code_of(job->result)));
}

static void llmcbi_offload_cancel(llmcb_op *op, llmcb_detail detail)
{
    llmcbi_offload_op *o = (llmcbi_offload_op *)(void *)op;

    (void)detail;
    if (!llmcbi_job_withdraw(op->loop, o->job)) o->job->owner = NULL;
    o->job = NULL;
    llmcbi_op_finish(op, llmcbi_error_const(LLMCB_ECANCELLED));
}

static void llmcbi_offload_destroy(llmcb_op *op)
{
    llmcbi_free(&op->loop->alloc, op, sizeof(llmcbi_offload_op));
}

static const llmcbi_op_kind llmcbi_offload_kind = { llmcbi_offload_cancel,
                                                    llmcbi_offload_destroy,
                                                    NULL, NULL, NULL };

LLMCBI_DEF llmcb_op *llmcb_offload(llmcb_loop *loop, int (*fn)(void *arg),
                                   void *arg)
{
    llmcbi_offload_op *o;
    llmcb_code code;

    if (llmcbi_enter(loop) != LLMCB_OK || !fn || loop->freeing) return NULL;
    o = (llmcbi_offload_op *)(void *)llmcbi_op_new(loop, sizeof *o,
                                                   &llmcbi_offload_kind);
    if (!o) return NULL;
    o->job = llmcbi_job_start(loop, fn, arg, llmcbi_offload_done, o, &code);
    if (!o->job)
        llmcbi_op_finish(&o->op, llmcbi_error_unstarted(loop, code, NULL));
    return &o->op;
}

/* ==== [RUN] runs, the run's log of events ============================== */

LLMCBI_DEF const char *llmcb_event_name(llmcb_event_kind kind)
{
    static const char *const names[LLMCB_N_EVENTS] = {
        "on_llm_start",     "on_chat_model_start",
        "on_llm_new_token", "on_llm_end",
        "on_llm_error",     "on_chain_start",
        "on_chain_end",     "on_chain_error",
        "on_agent_action",  "on_agent_finish",
        "on_tool_start",    "on_tool_end",
        "on_tool_error",    "on_retriever_start",
        "on_retriever_end", "on_retriever_error",
        "on_text",          "on_retry",
        "on_custom_event"
    };

    return (unsigned)kind < LLMCB_N_EVENTS ? names[kind] : "";
}

/* An event as it stands in the log, its payload behind it. Start and finish
 * are no records: they are part of the run and cannot fail. */
typedef struct llmcbi_record {
    uint32_t size; /* with its payload; the next one is 8-aligned */
    uint32_t kind; /* llmcb_event_kind, or one of these */
} llmcbi_record;

#define LLMCBI_JUMP 0xFFFFu
/* A token that is text of choice 0 and nothing else, as most are: the payload
 * is the text. Who shows it makes the chunk, so that a third of the memory
 * goes from thread to thread. */
#define LLMCBI_TEXT 0xFFFEu

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
#define LLMCBI_MAX_SPARE 4096u /* while anything is under way */
#define LLMCBI_MIN_SPARE 64u

/* The life of a run. */
typedef enum llmcbi_run_state {
    LLMCBI_RUN_NEW,
    LLMCBI_RUN_STARTING,  /* the start event is being delivered */
    LLMCBI_RUN_OPEN,      /* events may be appended */
    LLMCBI_RUN_DRAINING,  /* the outcome is known, earlier events remain */
    LLMCBI_RUN_DRAINED,   /* all are done with those */
    LLMCBI_RUN_FINISHING, /* the end or error event is being delivered */
    LLMCBI_RUN_DONE
} llmcbi_run_state;

/* Who reads the tokens as chunks, behind the handlers. */
typedef struct llmcbi_reader {
    const char *pos;
    uint64_t seq;      /* events that it has passed */
    uint64_t end;      /* of a cancelled run */
    llmcb_chunk chunk; /* what it shows */
    bool shown;        /* the record at pos is in the program's hands */
} llmcbi_reader;

typedef struct llmcbi_run llmcbi_run;

/* What the runs of one owner have in common. */
typedef struct llmcbi_rules {
    /* A barrier was reached, there is room again, or a handler failed. */
    void (*told)(llmcbi_run *run);
    int64_t handler_ms;
    size_t window_events, window_bytes;
    llmcb_parts no_parts; /* what chunks of mere text show */
} llmcbi_rules;

struct llmcbi_run {
    llmcb_run pub;
    llmcb_op *home;        /* the op that it belongs to */
    llmcbi_ready ready;    /* the pump */
    llmcbi_timer patience; /* handler_ms; used if that is set */
    llmcbi_block *first, *last;
    llmcbi_jump anchor; /* where cursors begin */
    const llmcb_start *start;
    const llmcb_result *result;
    const llmcb_output *output;
    const llmcb_error *error; /* of the finish event */
    llmcbi_task *flusher;     /* waits until handlers have come to flush_at */
    uint64_t flush_at;
    uint64_t visible; /* events that others than inline handlers may have */
    uint64_t mark;    /* cursors are to tell when they reach it */
    const llmcb_handler *raised_by; /* the first LLMCB_RAISE failure */
    int raised_result;

    /* What each token needs, in one place. */
    bool lockstep;  /* some handler has LLMCB_AWAIT_EACH */
    bool starved;   /* the owner waits for room */
    bool abandoned; /* a handler was too slow; its cursors are given up */
    bool withheld;  /* its parent's start is still being told */
    uint8_t state, start_kind, finish_kind;
    llmcbi_flag over; /* workers may append nothing more */
    bool gave_up;     /* on a handler: it may still be reading */
    bool skipping;    /* cancelled: cursors jump to the finish */
    llmcb_loop *loop;
    /* upward: llmcbi_cursor */
    llmcbi_cursor *cursors;
    size_t n_cursors;
    llmcbi_reader *reader; /* NULL: none, or no more */
    uint64_t head;         /* events so far, with start and finish */
    uint64_t finish_seq;   /* 0: none yet */
    uint64_t slowest;      /* as of the last pump: no cursor is behind it */
    size_t held;           /* bytes in blocks */
    char *tail;            /* the free part of the last block */
    const llmcbi_rules *rules;
};

/* Each state goes to the next or, on a cancel, a failure or before anything
 * was told, to one further on. */
static void llmcbi_run_set_state(llmcbi_run *run, llmcbi_run_state to)
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

    (void)legal; /* without LLMCB_ASSERT */
    LLMCB_ASSERT((legal[run->state] >> to & 1) != 0);
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
    /* a pool that falls behind for a moment needs many, again and again */
    if (b->size == LLMCBI_BLOCK_SIZE && loop->n_spare + 1 <= LLMCBI_SPARE) {
        b->next = loop->spare;
        loop->spare = b;
        loop->n_spare++;
    } else {
        llmcbi_free(&loop->alloc, b, b->size);
    }
}

LLMCBI_APART static void llmcbi_block_trim(llmcb_loop *loop, size_t keep)
{
    while (loop->n_spare > keep) {
        llmcbi_block *b = loop->spare;
        loop->spare = b->next;
        loop->n_spare--;
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
        run->tail = NULL;
    }
    llmcbi_block_put(run->loop, b);
}

#define LLMCBI_ALIGN8(n) (((n) + 7) & ~(size_t)7)
#define LLMCBI_BLOCK_HEAD LLMCBI_ALIGN8(sizeof(llmcbi_block))

/* A block whose first record takes up to `need` bytes. */
static bool llmcbi_run_extend(llmcbi_run *run, size_t need)
{
    size_t all = LLMCBI_BLOCK_HEAD + need + sizeof(llmcbi_jump);
    llmcbi_block *b;
    llmcbi_jump *jump;

    if (need > UINT32_MAX) return false;
    b = llmcbi_block_get(run->loop, all);
    if (!b) return false;
    b->first_seq = run->head + 1;
    jump = run->last ? (llmcbi_jump *)(void *)run->tail : &run->anchor;
    jump->head.kind = LLMCBI_JUMP;
    jump->to = (char *)b + LLMCBI_BLOCK_HEAD;
    if (run->last)
        run->last->next = b;
    else
        run->first = b;
    run->last = b;
    run->held += b->size;
    run->tail = (char *)b + LLMCBI_BLOCK_HEAD;
    return true;
}

/* Bytes that are free in the last block. */
static inline size_t llmcbi_run_tail(const llmcbi_run *run)
{
    const llmcbi_block *b = run->last;

    if (!b) return 0;
    return (size_t)((const char *)b + b->size - run->tail) -
           sizeof(llmcbi_jump);
}

/* Room for a record with a payload of at most `size` bytes, which begins
 * where the returned pointer says. Nothing is appended before the commit.
 * NULL: no memory. */
static inline char *llmcbi_run_reserve(llmcbi_run *run, size_t size)
{
    size_t need = LLMCBI_ALIGN8(sizeof(llmcbi_record) + size);

    if (llmcbi_run_tail(run) < need && !llmcbi_run_extend(run, need))
        return NULL;
    return run->tail + sizeof(llmcbi_record);
}

/* The pump is to look at it. */
static void llmcbi_run_wake(llmcbi_run *run)
{
    llmcbi_make_ready(run->loop, &run->ready);
}

static inline void llmcbi_run_commit(llmcbi_run *run, unsigned kind,
                                     size_t size)
{
    llmcbi_record *rec = (llmcbi_record *)(void *)run->tail;

    rec->kind = kind;
    rec->size = (uint32_t)(sizeof *rec + size);
    run->tail += LLMCBI_ALIGN8(rec->size);
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

static const llmcbi_record *llmcbi_record_take(const char **pos)
{
    const llmcbi_record *rec = llmcbi_record_at(pos);

    *pos += LLMCBI_ALIGN8(rec->size);
    return rec;
}

static bool llmcbi_record_is_token(const llmcbi_record *rec)
{
    return rec->kind == LLMCBI_TEXT || rec->kind == LLMCB_LLM_NEW_TOKEN;
}

/* A token as it is shown: as it stands there, or in *room. */
LLMCBI_APART static const llmcb_chunk *
llmcbi_record_token(const llmcbi_record *rec, llmcb_chunk *room)
{
    if (rec->kind == LLMCB_LLM_NEW_TOKEN)
        return (const llmcb_chunk *)(const void *)(rec + 1);
    room->text =
        llmcbi_slice((const char *)(rec + 1), rec->size - sizeof *rec - 1);
    return room;
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

/* The same for text that may not be UTF-8: at most three times as long, and
 * 3 bytes. */
static llmcb_str llmcbi_record_utf8(char **at, llmcb_str s)
{
    llmcbi_carry c;
    char *out = *at;
    size_t i;

    memset(&c, 0, sizeof c);
    for (i = 0; i < s.len; i++)
        out = llmcbi_put_byte(out, &c, (unsigned char)s.ptr[i]);
    out = llmcbi_carry_flush(out, &c);
    *out = '\0';
    s = llmcbi_slice(*at, (size_t)(out - *at));
    *at = out + 1;
    return s;
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

/* Where one handler stands in one run. While on_pool, how far it has come is
 * in `away`, and is copied when the loop hears of it. */
struct llmcbi_cursor {
    llmcb_handler *handler;
    uint64_t done; /* events it is done with, as far as the loop knows */
    bool on_pool;
    bool unpublished;
    bool running;       /* its coroutine has begun and not ended */
    bool mute;          /* has not seen the start, or is given up */
    bool passing;       /* passes over all but the finish */
    bool timed;         /* the run waits for it, known at timed_at, since */
    uint8_t token_lane; /* llmcbi_lane of a token event */
    llmcbi_run *run;
    const char *pos;   /* the next record */
    llmcbi_away *away; /* NULL: nothing runs on the pool */
    llmcbi_task *task; /* NULL: nothing is async */
    uint64_t skipped;  /* events that it will not be shown */
    uint64_t timed_at;
    int64_t since;
};

/* The part of a cursor that the workers have. Under the mutex, but for pos,
 * done and failed while a worker is at it. */
struct llmcbi_away {
    llmcbi_cursor *cursor;
    llmcbi_strand *strand;
    llmcbi_cursor *next_unpublished; /* the loop's alone */
    llmcbi_away *next_in_strand, *next_progress;
    const char *pos;
    uint64_t done;
    uint64_t limit; /* events it may run; the loop sets this and the mark */
    uint64_t mark;
    uint64_t finish_seq;
    bool busy; /* in its strand's list or being run */
    bool in_progress;
    llmcbi_flag recalled; /* no further event, within a batch either */
    uint8_t failed_kind;  /* of the event in which the handler failed */
    int failed;           /* what it returned */
};

/* An event as a handler is shown it, and what that may point to. It is where
 * the handler runs: a cursor that waits has none. */
typedef struct llmcbi_shown {
    llmcb_event ev;
    llmcb_chunk chunk;
} llmcbi_shown;

typedef enum llmcbi_lane {
    LLMCBI_LANE_NONE,
    LLMCBI_LANE_INLINE,
    LLMCBI_LANE_ASYNC,
    LLMCBI_LANE_POOL
} llmcbi_lane;

/* The tables are pointers of one type in the order of the events. */
typedef char llmcbi_table_fits[sizeof(llmcb_sync_table) ==
                                       LLMCB_N_EVENTS * sizeof(llmcb_sync_fn)
                                   ? 1
                                   : -1];

static llmcb_sync_fn llmcbi_sync_fn(const llmcb_handler *h,
                                    llmcb_event_kind kind)
{
    llmcb_sync_fn fn;

    memcpy(&fn, (const char *)&h->sync + (size_t)kind * sizeof fn, sizeof fn);
    return fn;
}

static llmcb_async_fn llmcbi_async_fn(const llmcb_handler *h,
                                      llmcb_event_kind kind)
{
    llmcb_async_fn fn;

    memcpy(&fn, (const char *)&h->async + (size_t)kind * sizeof fn, sizeof fn);
    return fn;
}

static bool llmcbi_skips(const llmcb_handler *h, llmcb_event_kind kind)
{
    static const uint8_t masks[] = { LLMCB_SKIP_LLM,
                                     LLMCB_SKIP_LLM,
                                     LLMCB_SKIP_LLM,
                                     LLMCB_SKIP_LLM,
                                     LLMCB_SKIP_LLM,
                                     LLMCB_SKIP_CHAIN,
                                     LLMCB_SKIP_CHAIN,
                                     LLMCB_SKIP_CHAIN,
                                     LLMCB_SKIP_AGENT,
                                     LLMCB_SKIP_AGENT,
                                     LLMCB_SKIP_AGENT,
                                     LLMCB_SKIP_AGENT,
                                     LLMCB_SKIP_AGENT,
                                     LLMCB_SKIP_RETRIEVER,
                                     LLMCB_SKIP_RETRIEVER,
                                     LLMCB_SKIP_RETRIEVER,
                                     0,
                                     LLMCB_SKIP_RETRY,
                                     LLMCB_SKIP_CUSTOM };

    return (h->skip & masks[kind]) != 0;
}

static bool llmcbi_handles_chat_start(const llmcb_handler *h)
{
    return h->sync.on_chat_model_start || h->async.on_chat_model_start;
}

static llmcbi_lane llmcbi_lane_find(const llmcbi_cursor *c,
                                    llmcb_event_kind kind)
{
    const llmcb_handler *h = c->handler;

    if (llmcbi_skips(h, kind)) return LLMCBI_LANE_NONE;
    if (c->task && llmcbi_async_fn(h, kind)) return LLMCBI_LANE_ASYNC;
    if (!llmcbi_sync_fn(h, kind)) return LLMCBI_LANE_NONE;
    return c->away ? LLMCBI_LANE_POOL : LLMCBI_LANE_INLINE;
}

LLMCBI_APART static llmcbi_lane llmcbi_lane_of(const llmcbi_cursor *c,
                                               llmcb_event_kind kind)
{
    return kind == LLMCB_LLM_NEW_TOKEN ? (llmcbi_lane)c->token_lane
                                       : llmcbi_lane_find(c, kind);
}

static int llmcbi_cursor_call(const llmcbi_cursor *c, const llmcbi_shown *s)
{
    llmcb_handler *h = c->handler;

    return s->ev.kind == LLMCB_LLM_NEW_TOKEN /* nearly all are these */
               ? h->sync.on_llm_new_token(h, &s->ev)
               : llmcbi_sync_fn(h, s->ev.kind)(h, &s->ev);
}

/* What the event behind `done` is, which must exist. Moves pos behind its
 * record; start and finish have none. */
static inline llmcb_event_kind
llmcbi_cursor_next(const llmcbi_cursor *c, const char **pos, uint64_t done,
                   uint64_t finish_seq, const llmcbi_record **rec)
{
    const llmcbi_run *run = c->run;

    *rec = NULL;
    if (done == 0)
        return run->start_kind == LLMCB_CHAT_MODEL_START &&
                       !llmcbi_handles_chat_start(c->handler)
                   ? LLMCB_LLM_START
                   : (llmcb_event_kind)run->start_kind;
    if (done + 1 == finish_seq) return (llmcb_event_kind)run->finish_kind;
    *rec = llmcbi_record_take(pos);
    return llmcbi_record_is_token(*rec) ? LLMCB_LLM_NEW_TOKEN
                                        : (llmcb_event_kind)(*rec)->kind;
}

/* Event number `seq` as the handler of c gets it. Where *s shows a token of
 * this run already, the next one changes little. */
static void llmcbi_shown_fill(llmcbi_shown *s, const llmcbi_cursor *c,
                              llmcb_event_kind kind, const llmcbi_record *rec,
                              uint64_t seq)
{
    const llmcbi_run *run = c->run;
    const void *payload;
    llmcb_event *ev = &s->ev;

    if (kind != LLMCB_LLM_NEW_TOKEN || ev->kind != kind) {
        memset(s, 0, sizeof *s);
        s->chunk.parts = &run->rules->no_parts;
        ev->kind = kind;
        ev->run = (llmcb_run *)llmcbi_unconst(&run->pub);
    }
    ev->seq = seq;
    ev->skipped = c->skipped;
    if (seq == 1) {
        ev->start = run->start;
        return;
    }
    if (!rec) {
        ev->result = run->result;
        ev->output = run->output;
        ev->error = run->error->code == LLMCB_OK ? NULL : run->error;
        return;
    }
    payload = rec + 1;
    switch (kind) {
    case LLMCB_LLM_NEW_TOKEN:
        ev->token = llmcbi_record_token(rec, &s->chunk);
        break;
    case LLMCB_RETRY: ev->retry = (const llmcb_retry *)payload; break;
    case LLMCB_AGENT_ACTION: ev->action = (const llmcb_action *)payload; break;
    case LLMCB_AGENT_FINISH: ev->output = (const llmcb_output *)payload; break;
    default: ev->data = (const llmcb_data *)payload; break;
    }
}

/* -- workers */

#define LLMCBI_STRAND_BATCH 8

/* Under the mutex. What is urgent comes before all else, in its own order, if
 * its strand is not queued already. */
static void llmcbi_strand_queue(llmcbi_pool *p, llmcbi_strand *s, bool urgent)
{
    llmcbi_strand **at = urgent ? p->urgent_strand : p->last_strand;

    s->queued = true;
    s->next = *at;
    *at = s;
    if (urgent) p->urgent_strand = &s->next;
    if (!s->next) p->last_strand = &s->next;
}

/* Under the mutex. */
static void llmcbi_strand_add(llmcb_loop *loop, llmcbi_away *w, bool urgent)
{
    llmcbi_strand *s = w->strand;
    llmcbi_away **at = urgent ? s->urgent : s->last;

    w->next_in_strand = *at;
    *at = w;
    if (urgent) s->urgent = &w->next_in_strand;
    if (!w->next_in_strand) s->last = &w->next_in_strand;
    if (!s->queued) llmcbi_strand_queue(loop->pool, s, urgent);
}

/* Under the mutex: the loop is to look at it. */
static void llmcbi_away_report(llmcb_loop *loop, llmcbi_away *w)
{
    if (w->in_progress) return;
    w->in_progress = true;
    w->next_progress = NULL;
    *loop->last_progress = w;
    loop->last_progress = &w->next_progress;
}

static void llmcbi_strand_run(llmcb_loop *loop, llmcbi_strand *s)
{
    llmcbi_away *w = s->first;
    const llmcbi_cursor *c = w->cursor;
    uint64_t done = w->done, finish_seq = w->finish_seq;
    uint64_t stop = w->limit;
    const char *pos = w->pos;
    llmcb_event_kind kind = LLMCB_N_EVENTS;
    llmcbi_shown shown;
    bool handed_back = false;
    int failed = 0;

    s->first = w->next_in_strand;
    if (s->urgent == &w->next_in_strand) s->urgent = &s->first;
    if (s->last == &w->next_in_strand) s->last = &s->first;
    if (stop > done + LLMCBI_STRAND_BATCH) stop = done + LLMCBI_STRAND_BATCH;
    if (stop > done && c->run->rules->handler_ms > 0) stop = done + 1;
    llmcbi_unlock(loop);
    shown.ev.kind = LLMCB_N_EVENTS;
    while (done < stop && !failed && !LLMCBI_FLAG_GET(&w->recalled)) {
        const char *next = pos;
        const llmcbi_record *rec;
        llmcbi_lane lane;
        kind = llmcbi_cursor_next(c, &next, done, finish_seq, &rec);
        lane = llmcbi_lane_of(c, kind);
        if (lane == LLMCBI_LANE_ASYNC) {
            handed_back = true;
            break;
        }
        pos = next;
        done++;
        if (lane != LLMCBI_LANE_POOL) continue;
        llmcbi_shown_fill(&shown, c, kind, rec, done);
        failed = llmcbi_cursor_call(c, &shown);
    }
    llmcbi_lock(loop);
    w->done = done;
    w->pos = pos;
    w->failed = failed;
    w->failed_kind = (uint8_t)kind;
    w->busy = !failed && !handed_back && done < w->limit;
    if (w->busy) llmcbi_strand_add(loop, w, false);
    s->queued = false;
    if (s->first) llmcbi_strand_queue(loop->pool, s, s->urgent != &s->first);
    llmcbi_away_report(loop, w);
    if (failed || handed_back || done >= w->mark || (!w->busy && !w->limit)) {
        loop->progress_due = true;
        llmcbi_wake_sleeper(loop);
    }
}

/* How far the pool may go. */
LLMCBI_APART static uint64_t llmcbi_cursor_limit(const llmcbi_cursor *c)
{
    const llmcbi_run *run = c->run;

    return c->mute || (run->skipping && !run->finish_seq) ? 0 : run->visible;
}

/* Tells the workers of new events, in one go. */
static void llmcbi_publish(llmcb_loop *loop)
{
    llmcbi_cursor *c = loop->unpublished;
    llmcbi_pool *p = loop->pool;
    bool urgent = false;

    if (!c) return;
    loop->unpublished = NULL;
    loop->last_unpublished = &loop->unpublished;
    llmcbi_lock(loop);
    for (; c; c = c->away->next_unpublished) {
        const llmcbi_run *run = c->run;
        llmcbi_away *w = c->away;
        c->unpublished = false;
        if (!c->on_pool) continue; /* it has come back meanwhile */
        w->mark = run->mark;
        if (run->mark != UINT64_MAX) urgent = true; /* somebody waits */
        w->finish_seq = run->finish_seq;
        w->limit = llmcbi_cursor_limit(c);
        LLMCBI_FLAG_SET(&w->recalled, w->limit == 0);
        if (w->busy || w->failed) continue;
        if (w->done < w->limit) {
            w->busy = true;
            llmcbi_strand_add(loop, w,
                              w->done == 0 || w->done + 1 == w->finish_seq);
        } else { /* nothing to do: give it back */
            loop->progress_due = true;
            llmcbi_away_report(loop, w);
        }
    }
    if (p && p->n_idle && (urgent || !p->napping) &&
        llmcbi_pool_due(p) != LLMCBI_DUE_NONE)
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
        }
        /* the others finish what is in the log; in lock step there is only
         * this event, and who has not got it does not get it */
        c->passing = true;
        for (i = 0; i < run->n_cursors; i++)
            if (c->handler->flags & run->cursors[i].handler->flags &
                LLMCB_AWAIT_EACH)
                run->cursors[i].passing = true;
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

LLMCBI_APART static void
llmcbi_cursor_step_done(llmcbi_cursor *c, llmcb_event_kind kind, int result)
{
    c->done++;
    if (result) llmcbi_cursor_failed(c, kind, result);
}

#define LLMCBI_TASK_HEAD LLMCBI_ALIGN(sizeof(llmcbi_task))

/* What a handler's coroutine is shown lies between it and its frame. */
static llmcbi_shown *llmcbi_task_shown(llmcbi_task *t)
{
    return (llmcbi_shown *)(void *)((char *)t + LLMCBI_TASK_HEAD);
}

static llmcb_step llmcbi_cursor_task_step(llmcbi_task *t)
{
    const llmcbi_cursor *c = (const llmcbi_cursor *)t->owner;
    const llmcb_event *ev = &llmcbi_task_shown(t)->ev;

    return llmcbi_async_fn(c->handler, ev->kind)(&t->pub, c->handler, ev);
}

static void llmcbi_cursor_task_finish(llmcbi_task *t, llmcb_code code)
{
    llmcbi_cursor *c = (llmcbi_cursor *)t->owner;

    c->running = false;
    /* a coroutine that was cancelled and says so has not failed */
    if (code == LLMCB_ECANCELLED && c->run->skipping) code = LLMCB_OK;
    llmcbi_cursor_step_done(c, llmcbi_task_shown(t)->ev.kind, code);
    llmcbi_run_wake(c->run);
}

static void llmcbi_cursor_start_task(llmcbi_cursor *c)
{
    llmcbi_task *t = c->task;

    t->pub.at = 0;
    t->pub.result = LLMCB_OK;
    t->cancelled = false;
    if (c->handler->frame_size) memset(t->pub.frame, 0, c->handler->frame_size);
    c->running = true;
    llmcbi_task_run(&t->ready);
}

static void llmcbi_cursor_unpublish(llmcbi_cursor *c)
{
    if (c->unpublished) return;
    c->unpublished = true;
    c->away->next_unpublished = NULL;
    *c->run->loop->last_unpublished = c;
    c->run->loop->last_unpublished = &c->away->next_unpublished;
}

/* One event of those up to `limit`, if the handler is free. false: it has to
 * wait, for news or for itself. */
static bool llmcbi_cursor_advance(llmcbi_cursor *c, uint64_t limit)
{
    llmcbi_run *run = c->run;
    const llmcbi_record *rec;
    const char *next;
    llmcb_event_kind kind;
    llmcbi_shown shown;
    llmcbi_lane lane;

    if (c->on_pool || c->running || c->done >= run->head) return false;
    if (c->done >= limit && !run->skipping) return false;
    next = c->pos;
    if (run->skipping && c->done + 1 != run->finish_seq) {
        uint64_t to = run->finish_seq ? run->finish_seq - 1 : run->head;
        if (c->done == 0) c->mute = true;
        c->skipped += to - c->done;
        c->done = to;
        return true;
    }
    kind = llmcbi_cursor_next(c, &next, c->done, run->finish_seq, &rec);
    if (c->passing && c->done == 0) c->mute = true; /* it saw no start */
    if (c->mute || (c->passing && c->done + 1 != run->finish_seq))
        lane = LLMCBI_LANE_NONE;
    else
        lane = llmcbi_lane_of(c, kind);
    switch (lane) {
    case LLMCBI_LANE_INLINE:
        c->pos = next;
        shown.ev.kind = LLMCB_N_EVENTS;
        llmcbi_shown_fill(&shown, c, kind, rec, c->done + 1);
        llmcbi_cursor_step_done(c, kind, llmcbi_cursor_call(c, &shown));
        return true;
    case LLMCBI_LANE_ASYNC:
        c->pos = next;
        llmcbi_shown_fill(llmcbi_task_shown(c->task), c, kind, rec,
                          c->done + 1);
        llmcbi_cursor_start_task(c);
        return !c->running;
    case LLMCBI_LANE_POOL:
        c->on_pool = true;
        c->away->pos = c->pos;
        c->away->done = c->done;
        c->away->limit = 0;
        return false;
    case LLMCBI_LANE_NONE:
    default:
        c->pos = next;
        c->done++;
        return true;
    }
}

/* The events that every cursor is done with, as far as the loop knows, or
 * every one that has this flag. */
static uint64_t llmcbi_run_done(const llmcbi_run *run, unsigned flag)
{
    const llmcbi_cursor *c = run->cursors;
    uint64_t least = run->head;
    size_t n = run->n_cursors;

    for (; n; n--, c++)
        if (!c->mute && c->done < least && (!flag || c->handler->flags & flag))
            least = c->done;
    return least;
}

/* Whether no worker can be inside the run's memory. */
LLMCBI_APART static bool llmcbi_run_off_pool(const llmcbi_run *run)
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

    if (run->reader && run->reader->seq < past) past = run->reader->seq;
    for (i = 0; i < run->n_cursors; i++) /* mute ones still hold a place */
        if (run->cursors[i].done < past) past = run->cursors[i].done;
    while (run->first && run->first->next &&
           past >= run->first->next->first_seq)
        llmcbi_run_drop_first(run);
    if (run->first && past >= run->head && llmcbi_run_off_pool(run)) {
        while (run->first)
            llmcbi_run_drop_first(run);
        for (i = 0; i < run->n_cursors; i++)
            run->cursors[i].pos = (const char *)&run->anchor;
        if (run->reader) run->reader->pos = (const char *)&run->anchor;
    }
}

/* What the loop must be woken for. */
static void llmcbi_run_set_mark(llmcbi_run *run)
{
    if (run->lockstep)
        run->mark = run->visible;
    else if (run->state != LLMCBI_RUN_OPEN)
        run->mark = run->head;
    else if (run->starved)
        run->mark = run->head > run->rules->window_events / 2
                        ? run->head - run->rules->window_events / 2
                        : 0;
    else
        run->mark = UINT64_MAX;
    if (run->flusher && run->flush_at < run->mark) run->mark = run->flush_at;
    if (run->reader && run->reader->seq < run->mark)
        run->mark = run->reader->seq + 1;
}

/* How far all have read: where the window begins. */
static inline uint64_t llmcbi_run_window(const llmcbi_run *run)
{
    const llmcbi_reader *r = run->reader;

    return r && r->seq < run->slowest ? r->seq : run->slowest;
}

/* Whether the window has room. It is counted from the slowest cursor; an
 * empty log takes anything. */
static inline bool llmcbi_run_fits(const llmcbi_run *run)
{
    uint64_t from = llmcbi_run_window(run);

    return run->head - from < run->rules->window_events &&
           (run->held <= run->rules->window_bytes || from == run->head);
}

/* Whether the next event of the answer may be appended. */
static inline bool llmcbi_run_has_room(const llmcbi_run *run)
{
    return (!run->lockstep || /* those are done with all there is */
            llmcbi_run_done(run, LLMCB_AWAIT_EACH) == run->head) &&
           llmcbi_run_fits(run);
}

/* How far handlers may go while some are in lock step: one event beyond the
 * slowest of those. */
static uint64_t llmcbi_run_lockstep(const llmcbi_run *run)
{
    uint64_t done;

    if (!run->lockstep) return run->head;
    done = llmcbi_run_done(run, LLMCB_AWAIT_EACH);
    return done < run->head ? done + 1 : done;
}

/* A handler takes longer than it may, and the run waits for it. */
LLMCBI_APART static void llmcbi_run_watch_patience(llmcbi_run *run)
{
    bool waiting = run->slowest < run->head && (run->state != LLMCBI_RUN_OPEN ||
                                                run->starved || run->flusher);
    int64_t now = run->loop->now, first = INT64_MAX;
    uint64_t limit;
    size_t i;

    if (run->rules->handler_ms <= 0) return;
    limit = llmcbi_run_lockstep(run); /* behind it none is slow */
    if (run->state == LLMCBI_RUN_OPEN && !run->starved && run->flusher &&
        run->flush_at < limit)
        limit = run->flush_at;
    for (i = 0; i < run->n_cursors; i++) {
        llmcbi_cursor *c = &run->cursors[i];
        if (!waiting || c->mute || c->done >= limit) {
            c->timed = false;
            continue;
        }
        if (!c->timed || c->timed_at != c->done) c->since = now;
        c->timed = true;
        c->timed_at = c->done;
        if (c->since < first) first = c->since;
    }
    if (first == INT64_MAX)
        llmcbi_timer_stop(run->loop, &run->patience);
    else
        llmcbi_timer_start(run->loop, &run->patience,
                           first + run->rules->handler_ms - now);
}

#if LLMCBI_QUICK
/* As far as this event there is room in the window, but for its bytes. */
static inline uint64_t llmcbi_run_until(const llmcbi_run *run)
{
    return run->lockstep ? run->head + 1
                         : llmcbi_run_window(run) + run->rules->window_events;
}

/* Whether tokens may pass the log by: all handlers that take any do so
 * inline, and none is behind. */
static bool llmcbi_run_direct(llmcbi_run *run)
{
    llmcb_loop *loop = run->loop;
    size_t i;

    if (run->reader) return false;
    for (i = 0; i < run->n_cursors; i++) {
        const llmcbi_cursor *c = &run->cursors[i];
        if (c->token_lane > LLMCBI_LANE_INLINE || c->on_pool ||
            c->done != run->head || c->mute || c->passing)
            return false;
    }
    loop->token.kind = LLMCB_LLM_NEW_TOKEN;
    loop->token.run = &run->pub;
    loop->token.token = &loop->token_room;
    loop->token_room.parts = &run->rules->no_parts;
    return true;
}

/* Tells such a token. false: the next one may not be told so. */
static inline bool llmcbi_run_tell(llmcbi_run *run, llmcb_str text)
{
    llmcb_loop *loop = run->loop;
    llmcbi_cursor *c = run->cursors;
    size_t left = run->n_cursors;
    uint64_t seq = ++run->head;
    bool failed = false;

    loop->token.seq = seq;
    loop->token_room.text = text;
    for (; left; left--, c++) {
        int result =
            c->token_lane == LLMCBI_LANE_INLINE
                ? c->handler->sync.on_llm_new_token(c->handler, &loop->token)
                : 0;
        c->done = seq;
        if (!result) continue;
        llmcbi_cursor_failed(c, LLMCB_LLM_NEW_TOKEN, result);
        llmcbi_make_ready(loop, &run->ready);
        failed = true;
    }
    run->slowest = seq;
    return !failed && run->head == seq;
}
#endif

/* One event to each inline handler that is free; whether there was one. */
static bool llmcbi_run_serve_inline(llmcbi_run *run)
{
    uint64_t limit = llmcbi_run_lockstep(run);
    bool moved = false;
    size_t i;

    for (i = 0; i < run->n_cursors; i++)
        if (run->cursors[i].handler->flags & LLMCB_INLINE)
            moved |= llmcbi_cursor_advance(&run->cursors[i], limit);
    return moved;
}

/* Gives every handler what it can take, then tells the owner if something
 * that it waits for has come. */
static void llmcbi_run_pump(llmcbi_ready *r)
{
    llmcbi_run *run = LLMCBI_OWNER(llmcbi_run, ready, r);
    size_t i;
    bool moved = true;

    if (run->withheld && !run->skipping) return;
    run->loop->telling = true;
    while (moved) {
        moved = llmcbi_run_serve_inline(run);
        if (moved) continue;
        run->visible = llmcbi_run_lockstep(run);
        for (i = 0; i < run->n_cursors; i++)
            while (llmcbi_cursor_advance(&run->cursors[i], run->visible))
                moved = true;
    }
    run->loop->telling = false;
    run->slowest = llmcbi_run_done(run, 0);
    llmcbi_run_recycle(run);
    if (run->flusher && run->slowest >= run->flush_at)
        llmcbi_task_wake(run->flusher, LLMCB_OK);
    run->rules->told(run);
    llmcbi_run_set_mark(run);
    for (i = 0; i < run->n_cursors; i++) {
        llmcbi_cursor *c = &run->cursors[i];
        if (c->on_pool && (c->away->limit != llmcbi_cursor_limit(c) ||
                           c->away->mark != run->mark))
            llmcbi_cursor_unpublish(c);
    }
    llmcbi_run_watch_patience(run);
}

/* Under the mutex: how far workers have come since the last turn. Returns
 * whom they gave back. */
static llmcbi_away *llmcbi_hear_progress(llmcb_loop *loop)
{
    llmcbi_away *w, *next, *back = NULL, **last_back = &back;

    for (w = loop->progress; w; w = next) {
        llmcbi_cursor *c = w->cursor;
        next = w->next_progress;
        w->in_progress = false;
        c->done = w->done;
        c->pos = w->pos;
        llmcbi_unready(&c->run->ready); /* in the order of the last reports */
        llmcbi_run_wake(c->run);
        if (w->busy) continue; /* a worker may use next_progress again */
        w->next_progress = NULL;
        *last_back = w;
        last_back = &w->next_progress;
    }
    loop->progress = NULL;
    loop->last_progress = &loop->progress;
    return back;
}

static void llmcbi_take_back(llmcbi_away *w)
{
    for (; w; w = w->next_progress) {
        int failed = w->failed;
        w->cursor->on_pool = false;
        w->failed = 0;
        if (failed)
            llmcbi_cursor_failed(w->cursor, (llmcb_event_kind)w->failed_kind,
                                 failed);
    }
}

/* -- the life of a run, for its owner */

/* In which of its tables a handler has functions. */
#define LLMCBI_SYNC 1u
#define LLMCBI_ASYNC 2u
#define LLMCBI_TWICE 4u /* of one event in both */

static unsigned llmcbi_handler_has(const llmcb_handler *h)
{
    unsigned has = 0;
    int kind;

    for (kind = 0; kind < LLMCB_N_EVENTS; kind++) {
        bool sync = llmcbi_sync_fn(h, (llmcb_event_kind)kind) != NULL;
        bool async = llmcbi_async_fn(h, (llmcb_event_kind)kind) != NULL;
        if (sync) has |= LLMCBI_SYNC;
        if (async) has |= sync ? LLMCBI_TWICE : LLMCBI_ASYNC;
    }
    return has;
}

static llmcb_code llmcbi_check_handler(const llmcb_handler *h)
{
    return h && !(llmcbi_handler_has(h) & LLMCBI_TWICE) ? LLMCB_OK
                                                        : LLMCB_EINVAL;
}

static llmcbi_strand *llmcbi_strand_get(llmcb_loop *loop,
                                        const llmcb_handler *h)
{
    llmcbi_pool *p = loop->pool;
    llmcbi_strand *s;

    for (s = p->known; s; s = s->next_known)
        if (s->handler == h) {
            s->users++;
            return s;
        }
    s = (llmcbi_strand *)llmcbi_alloc(&loop->alloc, sizeof *s);
    if (!s) return NULL;
    s->urgent = s->last = &s->first;
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
    while (*at && *at != s)
        at = &(*at)->next_known;
    if (*at) *at = s->next_known;
    llmcbi_free(&loop->alloc, s, sizeof *s);
}

static void llmcbi_cursor_free(llmcb_loop *loop, llmcbi_cursor *c)
{
    if (c->away) {
        if (c->away->strand) llmcbi_strand_put(loop, c->away->strand);
        llmcbi_free(&loop->alloc, c->away, sizeof *c->away);
    }
    if (c->task) {
        llmcbi_unready(&c->task->ready);
        if (c->task->loop) llmcbi_task_disarm(c->task);
        llmcbi_timer_free(loop, &c->task->timer);
        llmcbi_free(&loop->alloc, c->task, c->task->size);
    }
}

static void llmcbi_run_free(llmcbi_run *run)
{
    llmcb_loop *loop = run->loop;
    llmcbi_cursor **at;
    size_t i;

    if (!loop) return; /* never begun */
    if (run->flusher) llmcbi_task_wake(run->flusher, LLMCB_ECANCELLED);
    at = &loop->unpublished;
    while (*at) {
        if ((*at)->run == run)
            *at = (*at)->away->next_unpublished;
        else
            at = &(*at)->away->next_unpublished;
    }
    loop->last_unpublished = at;
    while (run->first)
        llmcbi_run_drop_first(run);
    for (i = 0; i < run->n_cursors; i++)
        llmcbi_cursor_free(loop, &run->cursors[i]);
    if (!loop->n_alive) llmcbi_block_trim(loop, LLMCBI_MIN_SPARE);
    llmcbi_unready(&run->ready);
    llmcbi_timer_free(loop, &run->patience);
    run->loop = NULL;
}

LLMCBI_APART static llmcb_code
llmcbi_cursor_init(llmcbi_run *run, llmcbi_cursor *c, llmcb_handler *h)
{
    llmcb_loop *loop = run->loop;
    unsigned has = llmcbi_handler_has(h);

    c->run = run;
    c->handler = h;
    c->pos = (const char *)&run->anchor;
    if (has & LLMCBI_ASYNC) {
        size_t frame = LLMCBI_TASK_HEAD + LLMCBI_ALIGN(sizeof(llmcbi_shown));
        size_t size = frame + h->frame_size;
        llmcbi_task *t;
        if (h->frame_size > SIZE_MAX / 4) return LLMCB_EINVAL;
        t = (llmcbi_task *)llmcbi_alloc(&loop->alloc, size);
        if (!t) return LLMCB_ENOMEM;
        c->task = t;
        t->size = size;
        t->step = llmcbi_cursor_task_step;
        t->finish = llmcbi_cursor_task_finish;
        t->home = run->home;
        t->owner = c;
        t->pub.self = h->user;
        if (h->frame_size) t->pub.frame = (char *)t + frame;
        if (!llmcbi_task_init(loop, t)) return LLMCB_ENOMEM;
    }
    if ((has & LLMCBI_SYNC) && !(h->flags & LLMCB_INLINE)) {
        llmcb_code code = llmcbi_pool_start(loop);
        if (code != LLMCB_OK) return code;
        c->away = (llmcbi_away *)llmcbi_alloc(&loop->alloc, sizeof *c->away);
        if (!c->away) return LLMCB_ENOMEM;
        c->away->cursor = c;
        c->away->strand = llmcbi_strand_get(loop, h);
        if (!c->away->strand) return LLMCB_ENOMEM;
    }
    if (h->flags & LLMCB_AWAIT_EACH) run->lockstep = true;
    c->token_lane = (uint8_t)llmcbi_lane_find(c, LLMCB_LLM_NEW_TOKEN);
    return LLMCB_OK;
}

static void llmcbi_run_impatient(llmcbi_timer *t);

/* Everything that the run can need until its finish is reserved here. */
static llmcb_code llmcbi_run_init(llmcb_loop *loop, llmcbi_run *run,
                                  llmcbi_arena *arena,
                                  llmcb_handler *const *handlers, size_t n,
                                  llmcb_op *home)
{
    llmcb_code code = LLMCB_OK;
    size_t i;

    run->loop = loop;
    run->home = home;
    run->ready.fn = llmcbi_run_pump;
    run->mark = UINT64_MAX;
    if (run->rules->handler_ms > 0 &&
        !llmcbi_timer_init(loop, &run->patience, llmcbi_run_impatient))
        return LLMCB_ENOMEM;
    if (!n) return LLMCB_OK;
    run->cursors = (llmcbi_cursor *)llmcbi_arena_get(&loop->alloc, arena,
                                                     n * sizeof *run->cursors);
    if (!run->cursors) return LLMCB_ENOMEM;
    for (i = 0; i < n && code == LLMCB_OK; i++) {
        run->n_cursors++; /* what has been begun must be freed */
        code = llmcbi_cursor_init(run, &run->cursors[i], handlers[i]);
    }
    return code;
}

static void llmcbi_run_begin(llmcbi_run *run, llmcb_event_kind kind,
                             const llmcb_start *start)
{
    const llmcb_op *parent = run->home->parent;

    llmcbi_run_set_state(run, LLMCBI_RUN_STARTING);
    run->withheld = parent && !parent->open;
    run->pub.started_ms = run->loop->now;
    run->start_kind = (uint8_t)kind;
    run->start = start;
    run->head = 1;
    llmcbi_run_wake(run);
}

/* The parent's start has been told. */
static void llmcbi_run_release(llmcbi_run *run)
{
    run->withheld = false;
    run->pub.started_ms = run->loop->now;
    llmcbi_run_wake(run);
}

/* The awaits of coroutines that are at it end. */
static void llmcbi_run_interrupt(llmcbi_run *run)
{
    size_t i;

    for (i = 0; i < run->n_cursors; i++)
        if (run->cursors[i].running) llmcbi_task_cancel(run->cursors[i].task);
}

/* Whether a worker is in the run's memory. */
static bool llmcbi_run_in_use(const llmcbi_run *run)
{
    return run->loop && !run->loop->joined && !llmcbi_run_off_pool(run);
}

/* Events handed out already end; the rest is skipped. */
static void llmcbi_run_skip(llmcbi_run *run)
{
    size_t i;

    run->skipping = true;
    llmcbi_run_interrupt(run);
    for (i = 0; i < run->n_cursors; i++)
        if (run->cursors[i].on_pool) llmcbi_cursor_unpublish(&run->cursors[i]);
    if (run->reader) run->reader->end = run->slowest;
    llmcbi_run_wake(run);
}

/* The outcome is known: no more events but the finish. */
static void llmcbi_run_drain(llmcbi_run *run)
{
    if (run->state >= LLMCBI_RUN_DRAINING) return;
    llmcbi_run_set_state(run, LLMCBI_RUN_DRAINING);
    run->starved = false;
    llmcbi_run_wake(run);
}

/* The event is the end or the error of its kind of run. */
static void llmcbi_run_finish(llmcbi_run *run, const llmcb_result *result,
                              const llmcb_output *output,
                              const llmcb_error *error)
{
    int end = run->start_kind == LLMCB_CHAT_MODEL_START
                  ? LLMCB_LLM_END
                  : run->start_kind + 1; /* of the others, the next kind */

    llmcbi_run_set_state(run, LLMCBI_RUN_FINISHING);
    run->finish_kind =
        (uint8_t)(end + (error->code != LLMCB_OK)); /* likewise */
    run->pub.finished_ms = run->loop->now;
    run->result = result;
    run->output = output;
    run->error = error;
    run->finish_seq = ++run->head;
    LLMCBI_FLAG_SET(&run->over, true);
    llmcbi_run_wake(run);
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
        if (!c->timed || c->mute || c->done != c->timed_at ||
            c->since + run->rules->handler_ms > run->loop->now)
            continue;
        c->mute = true;
        run->gave_up = true;
        if (c->running) llmcbi_task_cancel(c->task);
        if (c->on_pool) llmcbi_cursor_unpublish(c);
        run->abandoned = true;
    }
    llmcbi_run_wake(run);
}

static void llmcbi_run_impatient(llmcbi_timer *t)
{
    llmcbi_run_abandon(LLMCBI_OWNER(llmcbi_run, patience, t));
}

/* Whether a handler has failed, or was given up, since the last time. */
static bool llmcbi_run_trouble(llmcbi_run *run, llmcb_error *e)
{
    bool raised = run->raised_by != NULL;

    if (!raised && !run->abandoned) return false;
    llmcbi_error_set(e, raised ? LLMCB_EHANDLER : LLMCB_ETIMEDOUT,
                     raised ? NULL : "a handler took longer than handler_ms");
    e->detail = raised ? LLMCB_DETAIL_NONE : LLMCB_DETAIL_HANDLER;
    e->handler_result = run->raised_result;
    if (raised && run->raised_by->name) {
        llmcbi_error_add(e, ": ", 2);
        llmcbi_error_add(e, run->raised_by->name, strlen(run->raised_by->name));
    }
    run->raised_by = NULL;
    run->abandoned = false;
    return true;
}

/* A copy of an error with the failure of a handler on top of it. */
static const llmcb_error *llmcbi_error_both(const llmcb_allocator *a,
                                            const llmcb_error *e,
                                            const llmcb_error *failed)
{
    llmcb_error both = *e;

    both.handler_result = failed->handler_result;
    return llmcbi_error_keep(a, &both);
}

/* What a failure of handlers makes of an outcome that was known before and
 * is not being told yet. false: of none, it stays. */
static bool llmcbi_outcome_replaced(const llmcb_allocator *a,
                                    const llmcb_error **outcome,
                                    const llmcb_error *e)
{
    const llmcb_error *had = *outcome;
    bool stays = had && had->code != LLMCB_OK;

    if (stays && (e->code != LLMCB_EHANDLER || had->handler_result ||
                  had->code == LLMCB_EHANDLER))
        return false;
    *outcome = stays ? llmcbi_error_both(a, had, e) : NULL;
    llmcbi_error_drop(a, had);
    return !stays;
}

/* The error of an op: its outcome, and a failure that changed no event. */
LLMCBI_APART static const llmcb_error *
llmcbi_outcome_error(const llmcb_allocator *a, const llmcb_error *outcome,
                     const llmcb_error *late)
{
    if (!late || outcome->handler_result) return llmcbi_error_keep(a, outcome);
    return outcome->code == LLMCB_OK ? llmcbi_error_keep(a, late)
                                     : llmcbi_error_both(a, outcome, late);
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
    llmcbi_emission *e;
    char *at;
    llmcb_code code;

    if (LLMCBI_FLAG_GET(&run->over)) return LLMCB_ESTATE;
    e = (llmcbi_emission *)llmcbi_alloc(a, size);
    if (!e) return LLMCB_ENOMEM;
    at = (char *)(e + 1);
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
    if (!llmcbi_run_fits(run)) return LLMCB_EBUSY;
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
    return llmcbi_run_emit(run, LLMCB_CUSTOM_EVENT, llmcb_text(name), data);
}

LLMCBI_DEF llmcb_step llmcb_await_run(llmcb_task *t, llmcb_run *run)
{
    llmcbi_task *task = llmcbi_await(t);
    llmcbi_run *r = (llmcbi_run *)(void *)run;
    llmcb_code code = LLMCB_OK;

    if (!task) return LLMCB_WAIT;
    if (!r)
        code = LLMCB_ENOMEM;
    else if (r->loop != task->loop)
        code = LLMCB_EINVAL;
    else if (r->home == task->home || llmcbi_withheld_by(task, r->home))
        code = LLMCB_ESTATE;
    else if (r->flusher)
        code = LLMCB_EBUSY;
    if (code != LLMCB_OK || r->slowest >= r->head)
        return llmcbi_await_over(task, code);
    r->flush_at = r->head;
    r->flusher = task;
    task->slot = &r->flusher;
    llmcbi_run_wake(r); /* sets the mark */
    return LLMCB_WAIT;
}

/* -- the configuration of a call */

static bool llmcbi_labels_ok(const char *const *tags, size_t n_tags,
                             const llmcb_pair *metadata, size_t n_metadata)
{
    size_t i;

    for (i = 0; i < n_tags; i++)
        if (!tags[i]) return false;
    for (i = 0; i < n_metadata; i++)
        if (!metadata[i].key || !metadata[i].value) return false;
    return true;
}

/* A configuration begins with its lists. */
#define LLMCBI_N_LISTS 6

typedef struct llmcbi_list {
    const void *items;
    size_t n;
} llmcbi_list;

typedef char llmcbi_lists_fit[offsetof(llmcb_config, run_name) ==
                                      LLMCBI_N_LISTS * sizeof(llmcbi_list)
                                  ? 1
                                  : -1];

/* What is wrong with a configuration, or NULL. */
static const char *llmcbi_config_check(const llmcb_loop *loop,
                                       const llmcb_config *c, llmcb_code *code)
{
    const llmcbi_run *parent = (const llmcbi_run *)(const void *)c->parent;
    llmcbi_list lists[LLMCBI_N_LISTS];
    size_t i;

    *code = LLMCB_EINVAL;
    memcpy(lists, c, sizeof lists);
    for (i = 0; i < LLMCBI_N_LISTS; i++)
        if (lists[i].n && !lists[i].items)
            return "a list of the configuration is NULL";
    if (c->run_id && !llmcbi_uuid_valid(c->run_id))
        return "run_id is not a UUID";
    if (c->parent_id && !llmcbi_uuid_valid(c->parent_id))
        return "parent_id is not a UUID";
    if (!llmcbi_labels_ok(c->tags, c->n_tags, c->metadata, c->n_metadata) ||
        !llmcbi_labels_ok(c->local_tags, c->n_local_tags, c->local_metadata,
                          c->n_local_metadata))
        return "a tag or metadata is NULL";
    for (i = 0; i < c->n_callbacks + c->n_local_callbacks; i++)
        if (llmcbi_check_handler(i < c->n_callbacks
                                     ? c->callbacks[i]
                                     : c->local_callbacks[i - c->n_callbacks]))
            return "a handler is NULL, or has one event in both tables";
    if (parent && parent->loop != loop)
        return "the parent run belongs to another loop";
    *code = LLMCB_ESTATE;
    if (parent && (parent->state == LLMCBI_RUN_NEW || /* it never began */
                   parent->start_kind == LLMCB_CHAT_MODEL_START ||
                   parent->state >= LLMCBI_RUN_DRAINING))
        return "the parent run has ended, or can have no children";
    *code = LLMCB_OK;
    return NULL;
}

/* arena NULL: the string itself, which lives long enough. */
static const char *llmcbi_arena_copy(const llmcb_allocator *a,
                                     llmcbi_arena *arena, const char *s)
{
    return s && arena ? llmcbi_arena_text(a, arena, s, strlen(s)) : s;
}

/* Adds copies of tags to n others. Later lists win: one that comes again
 * moves to the end. */
static size_t llmcbi_add_tags(const llmcb_allocator *a, llmcbi_arena *arena,
                              const char **out, size_t n,
                              const char *const *tags, size_t n_tags)
{
    size_t i, k, old = n;

    for (i = 0; i < n_tags; i++) {
        for (k = 0; k < old && strcmp(out[k], tags[i]) != 0;)
            k++;
        if (k < old) {
            memmove(out + k, out + k + 1, (--n - k) * sizeof *out);
            old--;
        }
        out[n++] = llmcbi_arena_copy(a, arena, tags[i]);
    }
    return n;
}

static size_t llmcbi_add_pair(const llmcb_allocator *a, llmcbi_arena *arena,
                              llmcb_pair *out, size_t n, const char *key,
                              const char *value)
{
    size_t k;

    for (k = 0; k < n && strcmp(out[k].key, key) != 0;)
        k++;
    out[k].key = llmcbi_arena_copy(a, arena, key);
    out[k].value = llmcbi_arena_copy(a, arena, value);
    return k == n ? n + 1 : n;
}

static size_t llmcbi_add_pairs(const llmcb_allocator *a, llmcbi_arena *arena,
                               llmcb_pair *out, size_t n,
                               const llmcb_pair *pairs, size_t n_pairs)
{
    for (; n_pairs; n_pairs--, pairs++)
        n = llmcbi_add_pair(a, arena, out, n, pairs->key, pairs->value);
    return n;
}

/* The lists of a configuration as the runs of one call have them. */
typedef struct llmcbi_setup {
    llmcb_handler **handlers;
    size_t n_handlers;
    const char *const *tags;
    size_t n_tags;
    const llmcb_pair *metadata;
    size_t n_metadata;
} llmcbi_setup;

static void llmcbi_setup_add(llmcbi_setup *s, llmcb_handler *const *list,
                             size_t n)
{
    size_t i, k;

    for (i = 0; i < n; i++) {
        for (k = 0; k < s->n_handlers && s->handlers[k] != list[i];)
            k++;
        if (k == s->n_handlers) s->handlers[s->n_handlers++] = list[i];
    }
}

static void llmcbi_setup_tags(const llmcb_allocator *a, llmcbi_arena *arena,
                              llmcbi_setup *s, const llmcb_config *c)
{
    const char **tags;
    size_t n = c->n_tags + c->n_local_tags + (c->step ? 1 : 0);

    if (!n) return;
    tags = (const char **)llmcbi_arena_get(a, arena,
                                           (n + s->n_tags) * sizeof *tags);
    if (!tags) return;
    n = llmcbi_add_tags(a, arena, tags, 0, c->tags, c->n_tags);
    n = llmcbi_add_tags(a, arena, tags, n, c->local_tags, c->n_local_tags);
    n = llmcbi_add_tags(a, arena, tags, n, &c->step, c->step ? 1 : 0);
    s->n_tags = llmcbi_add_tags(a, NULL, tags, n, s->tags, s->n_tags);
    s->tags = tags;
}

static void llmcbi_setup_metadata(const llmcb_allocator *a, llmcbi_arena *arena,
                                  llmcbi_setup *s, const llmcb_config *c)
{
    llmcb_pair *pairs;
    size_t n = c->n_metadata + c->n_local_metadata;

    if (!n) return;
    pairs = (llmcb_pair *)llmcbi_arena_get(a, arena,
                                           (n + s->n_metadata) * sizeof *pairs);
    if (!pairs) return;
    n = llmcbi_add_pairs(a, arena, pairs, 0, c->metadata, c->n_metadata);
    n = llmcbi_add_pairs(a, arena, pairs, n, c->local_metadata,
                         c->n_local_metadata);
    s->n_metadata =
        llmcbi_add_pairs(a, NULL, pairs, n, s->metadata, s->n_metadata);
    s->metadata = pairs;
}

/* First the configuration's lists, then its local ones, then those of the
 * object that makes the runs (which are not copied), then the loop's hooks.
 * No memory: the arena has failed. */
LLMCBI_APART static void llmcbi_setup_make(llmcb_loop *loop,
                                           llmcbi_arena *arena, llmcbi_setup *s,
                                           const llmcb_config *c,
                                           const llmcb_config *own)
{
    const llmcb_allocator *a = &loop->alloc;

    s->handlers = (llmcb_handler **)llmcbi_arena_get(
        a, arena,
        (c->n_callbacks + c->n_local_callbacks + own->n_callbacks +
         loop->n_hooks) *
            sizeof *s->handlers);
    s->n_handlers = 0;
    s->tags = own->tags;
    s->n_tags = own->n_tags;
    s->metadata = own->metadata;
    s->n_metadata = own->n_metadata;
    llmcbi_setup_tags(a, arena, s, c);
    llmcbi_setup_metadata(a, arena, s, c);
    if (arena->failed) return;
    llmcbi_setup_add(s, c->callbacks, c->n_callbacks);
    llmcbi_setup_add(s, c->local_callbacks, c->n_local_callbacks);
    llmcbi_setup_add(s, own->callbacks, own->n_callbacks);
    llmcbi_setup_add(s, loop->hooks, loop->n_hooks);
}

/* What the first run of a call is known by. */
static void llmcbi_run_name(llmcbi_run *run, llmcbi_arena *arena,
                            const llmcb_config *c, const llmcbi_setup *s,
                            const char *otherwise)
{
    llmcb_run *pub = &run->pub;
    const char *parent = c->parent ? c->parent->id : c->parent_id;

    llmcbi_uuid(&run->loop->random, pub->id);
    if (parent) memcpy(pub->parent_id, parent, sizeof pub->parent_id);
    pub->name = otherwise;
    if (c->run_name)
        pub->name = llmcbi_arena_copy(&run->loop->alloc, arena, c->run_name);
    pub->tags = s->tags;
    pub->n_tags = s->n_tags;
    pub->metadata = s->metadata;
    pub->n_metadata = s->n_metadata;
}

static void llmcbi_run_adopt(const llmcb_config *c, llmcb_op *child)
{
    if (c->parent)
        llmcbi_op_adopt(((llmcbi_run *)(void *)c->parent)->home, child);
}

LLMCBI_DEF void llmcb_loop_unhook(llmcb_loop *loop, llmcb_handler *h)
{
    size_t i;

    if (llmcbi_enter(loop) != LLMCB_OK) return;
    for (i = 0; i < loop->n_hooks && loop->hooks[i] != h;)
        i++;
    if (i == loop->n_hooks) return;
    memmove(loop->hooks + i, loop->hooks + i + 1,
            (--loop->n_hooks - i) * sizeof *loop->hooks);
}

LLMCBI_DEF llmcb_code llmcb_loop_hook(llmcb_loop *loop, llmcb_handler *h)
{
    llmcb_code code = llmcbi_enter(loop);
    llmcb_handler **grown;
    size_t n;

    if (code != LLMCB_OK) return code;
    if (llmcbi_check_handler(h) != LLMCB_OK) return LLMCB_EINVAL;
    llmcb_loop_unhook(loop, h); /* at most once */
    if (loop->n_hooks == loop->hooks_cap) {
        n = loop->hooks_cap ? 2 * loop->hooks_cap : 4;
        grown = (llmcb_handler **)llmcbi_resize(&loop->alloc, loop->hooks,
                                                loop->hooks_cap * sizeof *grown,
                                                n * sizeof *grown);
        if (!grown) return LLMCB_ENOMEM;
        loop->hooks = grown;
        loop->hooks_cap = n;
    }
    loop->hooks[loop->n_hooks++] = h;
    return LLMCB_OK;
}

/* -- the end of a loop */

static void llmcbi_cancel_all(llmcb_loop *loop)
{
    llmcbi_link *l, *next;

    for (l = loop->ops; l; l = next) {
        llmcb_op *op = LLMCBI_OWNER(llmcb_op, all, l);
        next = l->next;
        if (!op->done) op->kind->cancel(op, LLMCB_DETAIL_LOOP);
    }
}

/* Waits for the workers to leave. false: one is stuck. */
LLMCBI_APART static bool llmcbi_pool_join(llmcb_loop *loop, int64_t deadline)
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
        if (exited == p->n_threads)
            pthread_join(p->threads[i], NULL);
        else
            pthread_detach(p->threads[i]);
    }
    return exited == p->n_threads;
}

/* Everything, or all that a stuck thread does not use. */
static void llmcbi_loop_release(llmcb_loop *loop, bool stuck)
{
    llmcb_allocator a = loop->alloc;

    loop->turning = true; /* for good: what is called may not run it */
    loop->joined = !stuck;
    loop->dead = NULL;
    while (!llmcbi_list_empty(&loop->ready))
        llmcbi_unready(loop->ready.next);
    while (loop->transports) {
        llmcb_transport *tr = loop->transports;
        loop->transports = tr->next;
        if (tr->free) tr->free(tr);
    }
    while (loop->ops) {
        llmcb_op *op = LLMCBI_OWNER(llmcb_op, all, loop->ops);
        op->done = true;
        while (op->waiters)
            llmcbi_link_out(op->waiters);
        if (op->reader) op->reader->slot = NULL;
        llmcbi_op_destroy(op);
    }
    llmcbi_block_trim(loop, 0);
    llmcbi_poller_close(loop);
    llmcbi_free(&a, loop->heap, loop->heap_cap * sizeof *loop->heap);
    llmcbi_free(&a, loop->hooks, loop->hooks_cap * sizeof *loop->hooks);
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

/* Closes the connections of a parent in its child.
 * upward: llmcbi_transports_forked */
static void llmcbi_transports_forked(llmcb_loop *loop);

LLMCBI_DEF llmcb_code llmcb_loop_free(llmcb_loop *loop)
{
    int64_t deadline;
    bool late = false, stuck;

    if (!loop) return LLMCB_OK;
    if (loop->pid != getpid()) {
        /* the threads stayed in the parent; the memory is a copy */
        llmcbi_transports_forked(loop);
        LLMCBI_SYS(close)(loop->wake_fd[0]);
        LLMCBI_SYS(close)(loop->wake_fd[1]);
        if (loop->epoll_fd >= 0) LLMCBI_SYS(close)(loop->epoll_fd);
        return LLMCB_EFORK;
    }
    if (llmcbi_may_turn(loop) != LLMCB_OK) return LLMCB_ESTATE;
    llmcb_loop_set_host(loop, NULL);
    deadline = llmcbi_clock_ms() + loop->shutdown_ms;
    loop->freeing = true;
    llmcbi_cancel_all(loop); /* once: nothing new starts, and awaits end */
    while (loop->n_alive && !late) {
        int64_t left = deadline - llmcbi_clock_ms();
        llmcbi_turn(loop, left > 0 ? left : 0); /* once even if it is late */
        late = left <= 0 && loop->n_alive;
    }
    /* threads that are idle leave at once, but not in no time */
    stuck = !llmcbi_pool_join(loop, deadline + 200);
    llmcbi_lock(loop);
    loop->closed = true;
    llmcbi_unlock(loop);
    if (!stuck) llmcbi_turn(loop, 0); /* what workers left behind */
    llmcbi_loop_release(loop, stuck);
    return late || stuck ? LLMCB_ETIMEDOUT : LLMCB_OK;
}

/* ==== [HTTP] exchanges, HTTP/1.1 response parser, retry rules ========== */

/* Who reads the response of an exchange. */
typedef struct llmcbi_sink {
    void (*connected)(void *owner);
    void (*sent)(void *owner);
    void (*status)(void *owner, int status);
    void (*header)(void *owner, llmcb_str name, llmcb_str value);
    /* Shortens each piece by what it took: the rest must wait for resume, and
     * so must what comes next if there are none. */
    void (*data)(void *owner, llmcb_str *pieces, size_t n);
    void (*end)(void *owner, llmcb_ending ending, const llmcb_error *error);
    void (*again)(void *owner); /* a kept connection was dead: a new one */
    size_t hot; /* where the owner has what data needs, some 256 bytes */
} llmcbi_sink;

/* What came when the sink had no room. */
typedef struct llmcbi_held {
    llmcbi_buf bytes;
    size_t taken; /* of them */
    llmcb_ending ending;
    const llmcb_error *end_error; /* an end behind the bytes */
} llmcbi_held;

struct llmcb_exchange {
    const llmcbi_sink *sink;
    void *owner;
    bool ended;          /* by the transport */
    bool paused;         /* the transport waits for resume */
    bool lost;           /* something that there was no memory to hold */
    llmcb_transport *tr; /* NULL: closed */
    llmcbi_held *held;   /* NULL: nothing */
};

#define LLMCBI_EXCHANGE_HEAD LLMCBI_ALIGN(sizeof(llmcb_exchange))

LLMCBI_DEF void *llmcb_exchange_state(llmcb_exchange *x)
{
    return x ? (char *)x + LLMCBI_EXCHANGE_HEAD : NULL;
}

LLMCBI_DEF llmcb_code llmcb_transport_init(llmcb_loop *loop,
                                           llmcb_transport *tr)
{
    const llmcb_transport *known;

    if (!loop || !tr) return LLMCB_ENOMEM;
    if (!tr->start || !tr->resume || !tr->release || !tr->cancel)
        return LLMCB_EINVAL;
    for (known = loop->transports; known; known = known->next)
        if (known == tr) return LLMCB_EINVAL;
    tr->loop = loop;
    tr->next = loop->transports;
    loop->transports = tr;
    return LLMCB_OK;
}

/* Asks for what data for x goes through, while the kernel copies it: x and its
 * owner's part, which may be gone by now. */
static inline void llmcbi_exchange_fetch(const llmcb_exchange *x,
                                         const char *hot)
{
    LLMCBI_FETCH(x);
    LLMCBI_FETCH(hot);
    LLMCBI_FETCH(hot + 64);
    LLMCBI_FETCH(hot + 128);
    LLMCBI_FETCH(hot + 192);
}

/* An exchange is a part of its owner, who opens and closes it. */
static size_t llmcbi_exchange_size(const llmcb_transport *tr)
{
    return LLMCBI_EXCHANGE_HEAD + tr->state_size;
}

static void llmcbi_exchange_open(llmcb_exchange *x, llmcb_transport *tr,
                                 const llmcbi_sink *sink, void *owner)
{
    LLMCB_ASSERT(!x->tr);
    memset(x, 0, llmcbi_exchange_size(tr));
    x->tr = tr;
    x->sink = sink;
    x->owner = owner;
}

/* How the side above lets go of an exchange. */
typedef enum llmcbi_parting {
    LLMCBI_PART_RELEASE, /* the response was complete, as far as it matters */
    LLMCBI_PART_CANCEL,
    LLMCBI_PART_UNSTARTED
} llmcbi_parting;

static void llmcbi_exchange_drop_held(llmcb_exchange *x)
{
    const llmcb_allocator *a = &x->tr->loop->alloc;
    llmcbi_held *h = x->held;

    x->paused = false;
    x->held = NULL;
    if (!h) return;
    llmcbi_error_drop(a, h->end_error);
    llmcbi_buf_free(a, &h->bytes);
    llmcbi_free(a, h, sizeof *h);
}

/* Not inside a call of the transport's. */
static void llmcbi_exchange_close(llmcb_exchange *x, llmcbi_parting how)
{
    llmcb_transport *tr = x->tr;
    bool ended = x->ended;

    x->ended = true; /* what it says from now on is not heard */
    if (!ended && how == LLMCBI_PART_RELEASE) tr->release(tr, x);
    if (!ended && how == LLMCBI_PART_CANCEL) tr->cancel(tr, x);
    llmcbi_exchange_drop_held(x);
    x->tr = NULL;
}

LLMCBI_DEF void llmcb_exchange_connected(llmcb_exchange *x)
{
    if (x && !x->ended) x->sink->connected(x->owner);
}

#if !defined(LLMCB_NO_SOCKETS) || !defined(LLMCB_NO_CURL) || \
    !defined(LLMCB_NO_KIT)
static void llmcbi_exchange_again(llmcb_exchange *x)
{
    if (x && !x->ended) x->sink->again(x->owner);
}
#endif

LLMCBI_DEF void llmcb_exchange_sent(llmcb_exchange *x)
{
    if (x && !x->ended) x->sink->sent(x->owner);
}

LLMCBI_DEF void llmcb_exchange_status(llmcb_exchange *x, int status)
{
    if (x && !x->ended) x->sink->status(x->owner, status);
}

LLMCBI_DEF void llmcb_exchange_header(llmcb_exchange *x, llmcb_str name,
                                      llmcb_str value)
{
    if (x && !x->ended) x->sink->header(x->owner, name, value);
}

/* NULL: no memory. */
static llmcbi_held *llmcbi_exchange_hold(llmcb_exchange *x)
{
    if (!x->held)
        x->held =
            (llmcbi_held *)llmcbi_alloc(&x->tr->loop->alloc, sizeof *x->held);
    if (!x->held) x->lost = true;
    return x->held;
}

/* What came while the sink was at it comes behind what that has left. */
static void llmcbi_exchange_behind(llmcb_exchange *x, llmcbi_held *later)
{
    const llmcb_allocator *a = &x->tr->loop->alloc;
    llmcbi_held *h = x->held;

    if (!h) x->held = later;
    if (!h || !later) return;
    llmcbi_buf_add(a, &h->bytes, later->bytes.ptr, later->bytes.len);
    if (later->bytes.failed) h->bytes.failed = true;
    h->ending = later->ending;
    h->end_error = later->end_error;
    llmcbi_buf_free(a, &later->bytes);
    llmcbi_free(a, later, sizeof *later);
}

/* What is said inside a handler waits until that has returned. */
static void llmcbi_exchange_wait(llmcb_exchange *x)
{
    if (x->paused || !x->tr->loop->telling) return;
    x->paused = true;
    x->sink->data(x->owner, NULL, 0);
}

/* Pieces of the body; what is not taken of them is held until resume. */
static bool llmcbi_exchange_pieces(llmcb_exchange *x, llmcb_str *pieces,
                                   size_t n)
{
    llmcbi_held *h, *later = NULL;
    bool turning, open;
    size_t i;

    if (!x || x->ended) return false;
    if (!n) return !x->paused;
    llmcbi_exchange_wait(x);
    turning = llmcbi_visit(x->tr->loop);
    if (!x->paused) {
        x->sink->data(x->owner, pieces, n);
        later = x->held;
        x->held = NULL;
    }
    for (i = n; i && pieces[i - 1].len; i--) {
    } /* what is before it was taken */
    for (; i < n; i++) {
        x->paused = true;
        h = llmcbi_exchange_hold(x);
        if (h)
            llmcbi_buf_add(&x->tr->loop->alloc, &h->bytes, pieces[i].ptr,
                           pieces[i].len);
    }
    llmcbi_exchange_behind(x, later);
    open = !x->paused;
    llmcbi_leave(x->tr->loop, turning); /* a host may say more in there */
    return open;
}

LLMCBI_DEF bool llmcb_exchange_data(llmcb_exchange *x, const char *bytes,
                                    size_t len)
{
    llmcb_str piece = llmcbi_slice(bytes, len);

    return llmcbi_exchange_pieces(x, &piece, len ? 1 : 0);
}

static void llmcbi_exchange_over(llmcb_exchange *x, llmcb_ending ending,
                                 const llmcb_error *e)
{
    llmcb_loop *loop;
    llmcbi_held *h;
    bool turning;

    if (!x || x->ended) return;
    loop = x->tr->loop;
    llmcbi_exchange_wait(x);
    x->ended = true;
    if (!x->paused) {
        turning = llmcbi_visit(loop);
        x->sink->end(x->owner, ending, e);
        llmcbi_leave(loop, turning);
        return;
    }
    h = llmcbi_exchange_hold(x);
    if (!h) return;
    h->ending = ending;
    h->end_error = llmcbi_error_keep(&x->tr->loop->alloc, e);
}

LLMCBI_DEF void llmcb_exchange_end(llmcb_exchange *x, llmcb_ending ending,
                                   llmcb_code code, int sys_errno,
                                   const char *message)
{
    llmcb_error e;

    if (ending == LLMCB_BROKEN && code == LLMCB_OK) code = LLMCB_EIO;
    llmcbi_error_set(&e, code, message);
    e.sys_errno = sys_errno;
    llmcbi_exchange_over(x, ending, &e);
}

/* There is room again. Not inside a call of the transport's. */
static void llmcbi_exchange_resume(llmcb_exchange *x)
{
    llmcbi_held *h = x->held, *later;
    bool ended;

    if (!x->paused) return;
    /* what a handler says meanwhile is held, too, and comes next */
    while (h && !x->lost && !h->bytes.failed && h->taken < h->bytes.len) {
        llmcb_str rest =
            llmcbi_slice(h->bytes.ptr + h->taken, h->bytes.len - h->taken);
        x->held = NULL;
        x->sink->data(x->owner, &rest, 1);
        h->taken = h->bytes.len - rest.len;
        later = x->held;
        x->held = h;
        llmcbi_exchange_behind(x, later);
        if (rest.len) return;
    }
    ended = x->ended;
    if (x->lost || (h && h->bytes.failed)) {
        x->paused = false;
        x->ended = true;
        if (!ended) x->tr->cancel(x->tr, x);
        x->sink->end(x->owner, LLMCB_BROKEN, llmcbi_error_const(LLMCB_ENOMEM));
        return;
    }
    if (h && ended) {
        x->paused = false;
        x->sink->end(x->owner, h->ending, h->end_error);
    } else {
        llmcbi_exchange_drop_held(x);
        x->tr->resume(x->tr, x);
    }
}

/* -- addresses */

typedef struct llmcbi_url {
    bool tls;
    llmcb_str unix_path; /* len 0: TCP */
    llmcb_str host;      /* without brackets */
    llmcb_str authority; /* as written, for the Host field */
    llmcb_str target;    /* begins with a slash */
    uint16_t port;
} llmcbi_url;

static bool llmcbi_clean_text(const char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7F) return false;
    return true;
}

/* The number that len digits are, or at least INT64_MAX / 10; -1: not all of
 * them are digits. */
static int64_t llmcbi_number(const char *s, size_t len)
{
    int64_t v = 0;

    for (; len; len--, s++) {
        if (*s < '0' || *s > '9') return -1;
        if (v < INT64_MAX / 10) v = v * 10 + (*s - '0');
    }
    return v;
}

/* What is wrong with an address, or NULL. */
static const char *llmcbi_url_parse(llmcbi_url *u, const char *url)
{
    const char *p, *end, *mark;
    bool bracket;
    int64_t port;

    memset(u, 0, sizeof *u);
    for (p = url; *p; p++)
        if ((unsigned char)*p <= ' ' || *p == 0x7F)
            return "the address holds a blank or a control character";
    if (llmcbi_str_begins(url, "unix:")) {
        p = url + 5;
        mark = strchr(p, ':');
        if (!mark || mark == p || mark[1] != '/')
            return "the address is not of the form unix:/path:/target";
        u->unix_path = llmcbi_slice(p, (size_t)(mark - p));
        u->target = llmcb_text(mark + 1);
        u->host = u->authority = llmcb_text("localhost");
        return NULL;
    }
    u->tls = llmcbi_str_begins(url, "https://");
    if (!u->tls && !llmcbi_str_begins(url, "http://"))
        return "the address begins with none of https://, http:// and unix:";
    p = url + 7 + u->tls;
    end = p + strcspn(p, "/?#");
    u->port = u->tls ? 443 : 80;
    u->authority = llmcbi_slice(p, (size_t)(end - p));
    u->target = llmcb_text(*end == '/' ? end : "/");
    if (*end == '?' || strchr(end, '#'))
        return "the address has a query or fragment in the wrong place";
    if (memchr(p, '@', u->authority.len))
        return "the address holds a user name; use api_key";
    bracket = *p == '[';
    mark = (const char *)memchr(p, bracket ? ']' : ':', u->authority.len);
    if (!mark && bracket) return "the address has an unclosed bracket";
    if (!mark) mark = end;
    p += bracket;
    u->host = llmcbi_slice(p, (size_t)(mark - p));
    if (!u->host.len) return "the address has no host";
    mark += bracket;
    if (mark == end) return NULL;
    port = llmcbi_number(mark + 1, (size_t)(end - mark - 1));
    if (*mark != ':' || port < 1 || port > 65535)
        return "the address has a bad port";
    u->port = (uint16_t)port;
    return NULL;
}

/* 127.evil.example is a name, and so are 127.0.0.1.5 and 127.0.0.256. */
static bool llmcbi_is_loopback(llmcb_str host)
{
    unsigned number = 0, dots = 0;
    bool digit = false;
    size_t i;

    for (i = 0; i < host.len && number < 256; i++) {
        char c = host.ptr[i];
        if (c == '.' && digit) {
            dots++;
            digit = false;
            number = 0;
        } else if (c >= '0' && c <= '9' && (number || !digit)) {
            digit = true;
            number = number * 10 + (unsigned)(c - '0');
        } else {
            return false;
        }
    }
    return digit && number < 256 && dots == 3 &&
           llmcbi_str_begins(host.ptr, "127.");
}

/* Whether what is sent there stays on this machine. */
static bool llmcbi_url_is_local(const llmcbi_url *u)
{
    return u->unix_path.len || llmcbi_str_is_nocase(u->host, "localhost") ||
           llmcbi_str_is(u->host, "::1") || llmcbi_is_loopback(u->host);
}

/* -- header fields */

typedef struct llmcbi_field {
    llmcb_str name, value;
} llmcbi_field;

#define LLMCBI_H1_MAX_INTERIM 8

static bool llmcbi_token_char(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
           (c >= 'A' && c <= 'Z') || (c && strchr("!#$%&'*+-.^_`|~", c));
}

/* Whether some transport here reads HTTP/1.1 by itself; a proof, too. */
#ifndef LLMCBI_H1
#if !defined(LLMCB_NO_SOCKETS) || !defined(LLMCB_NO_KIT)
#define LLMCBI_H1 1
#else
#define LLMCBI_H1 0
#endif
#endif

#if LLMCBI_H1 || !defined(LLMCB_NO_CURL)
/* Without the blanks around it. */
static llmcb_str llmcbi_trim(llmcb_str s)
{
    while (s.len && (*s.ptr == ' ' || *s.ptr == '\t'))
        s.ptr++, s.len--;
    while (s.len && (s.ptr[s.len - 1] == ' ' || s.ptr[s.len - 1] == '\t'))
        s.len--;
    return s;
}

/* Splits "name: value". */
static bool llmcbi_h1_field(llmcb_str line, llmcbi_field *field)
{
    const char *s = line.ptr;
    size_t i = 0;

    while (i < line.len && llmcbi_token_char(s[i]))
        i++;
    if (i == 0 || i == line.len || s[i] != ':') return false;
    field->name = llmcbi_slice(s, i);
    for (i++; i < line.len; i++)
        if (((unsigned char)s[i] < 0x20 && s[i] != '\t') || s[i] == 0x7F)
            return false;
    i = field->name.len + 1;
    field->value = llmcbi_trim(llmcbi_slice(s + i, line.len - i));
    return true;
}
#endif

#if LLMCBI_H1
/* -- the response parser: bytes to head, body and end */

#define LLMCBI_H1_FAULTS(X)                                                 \
    X(NOT_HTTP, LLMCB_EPROTO, "not an HTTP/1 response")                     \
    X(BAD_STATUS, LLMCB_EPROTO, "a bad status line")                        \
    X(BAD_LINE, LLMCB_EPROTO, "a bad line in the response head")            \
    X(BAD_FIELD, LLMCB_EPROTO, "a bad header field")                        \
    X(BAD_LENGTH, LLMCB_EPROTO, "a bad Content-Length")                     \
    X(BAD_CODING, LLMCB_EPROTO, "an unknown transfer coding")               \
    X(TWO_LENGTHS, LLMCB_EPROTO, "both Content-Length and chunked")         \
    X(BAD_CHUNK, LLMCB_EPROTO, "bad chunk framing")                         \
    X(MUCH_FRAMING, LLMCB_ELIMIT, "the chunk framing outweighs the data")   \
    X(LONG_EXTENSION, LLMCB_ELIMIT, "a chunk extension is too long")        \
    X(LONG_TRAILER, LLMCB_ELIMIT, "the trailer is too long")                \
    X(MANY_INTERIM, LLMCB_ELIMIT, "too many interim responses")             \
    X(LONG_BODY, LLMCB_ELIMIT, "the response exceeds limits.body")          \
    X(LONG_LINE, LLMCB_ELIMIT, "a header line exceeds limits.header_line")  \
    X(LONG_HEAD, LLMCB_ELIMIT,                                              \
      "the response head exceeds limits.header_block")                      \
    X(MANY_FIELDS, LLMCB_ELIMIT,                                            \
      "more header fields than limits.header_fields")                       \
    X(NO_ANSWER, LLMCB_EIO, "the connection closed before an answer")       \
    X(CUT_STATUS, LLMCB_EPROTO, "the connection closed in the status line") \
    X(CUT_HEAD, LLMCB_ETRUNCATED,                                           \
      "the connection closed in the response head")                         \
    X(NO_MEMORY, LLMCB_ENOMEM, NULL)

typedef enum llmcbi_h1_type {
    LLMCBI_H1_MORE,
    LLMCBI_H1_STATUS,
    LLMCBI_H1_HEADER,
    LLMCBI_H1_DATA,
    LLMCBI_H1_END,
    LLMCBI_H1_ERROR
} llmcbi_h1_type;

/* What the parser's own functions return instead of LLMCBI_H1_ERROR. */
enum {
    LLMCBI_H1_FAULT = LLMCBI_H1_ERROR,
#define LLMCBI_ENTRY(name, code, text) LLMCBI_H1_##name,
    LLMCBI_H1_FAULTS(LLMCBI_ENTRY)
#undef LLMCBI_ENTRY
};

enum {
    LLMCBI_H1_AT_STATUS,
    LLMCBI_H1_AT_HEADER,
    LLMCBI_H1_AT_LENGTH,
    LLMCBI_H1_AT_CLOSE, /* body until the connection closes */
    LLMCBI_H1_AT_SIZE,
    LLMCBI_H1_AT_EXTENSION,
    LLMCBI_H1_AT_SIZE_LF,
    LLMCBI_H1_AT_CHUNK,
    LLMCBI_H1_AT_CHUNK_CR,
    LLMCBI_H1_AT_CHUNK_LF,
    LLMCBI_H1_AT_TRAILER,
    LLMCBI_H1_AT_END,
    LLMCBI_H1_AT_ERROR
};

/* Strict RFC 9112. Zeroed but for the limits: at the start of a response. */
typedef struct llmcbi_h1 {
    uint8_t state;
    bool begun; /* some byte has come, but for interim responses */
    bool interim, chunked, has_length;
    bool close; /* the connection cannot be used again */
    bool close_said;
    uint8_t digits, interims;
    uint8_t fault; /* what llmcbi_h1_why tells */
    uint16_t extension;
    int status;
    uint64_t left, body, framing, max_body;
    uint32_t block, fields;
    uint32_t max_line, max_block, max_fields;
    llmcbi_buf line; /* a line that began in earlier input */
} llmcbi_h1;

#define LLMCBI_H1_PIECES 32

/* A header field, or data: many pieces at once cost less than one by one. */
typedef struct llmcbi_found {
    llmcbi_field field;
    size_t n;
    llmcb_str pieces[LLMCBI_H1_PIECES];
} llmcbi_found;

#define LLMCBI_H1_MAX_EXTENSION 256
#define LLMCBI_H1_MAX_TRAILER 8192
#define LLMCBI_H1_FREE_FRAMING ((uint64_t)100 * 1024)

static void llmcbi_h1_free(const llmcb_allocator *a, llmcbi_h1 *h)
{
    llmcbi_buf_free(a, &h->line);
}

/* One line of the head without its CRLF. Limits are checked before anything
 * is kept. */
static int llmcbi_h1_line(const llmcb_allocator *a, llmcbi_h1 *h,
                          const char **p, const char *end, llmcb_str *line)
{
    const char *lf = (const char *)memchr(*p, '\n', (size_t)(end - *p));
    size_t n = (size_t)((lf ? lf + 1 : end) - *p);

    if (n > h->max_block - h->block) return LLMCBI_H1_LONG_HEAD;
    if (h->line.len + n > h->max_line) return LLMCBI_H1_LONG_LINE;
    *line = llmcbi_slice(*p, n);
    if (h->line.len || !lf) {
        llmcbi_buf_add(a, &h->line, *p, n);
        if (h->line.failed) return LLMCBI_H1_NO_MEMORY;
        *line = llmcbi_buf_str(&h->line);
    }
    h->block += (uint32_t)n;
    *p += n;
    if (!lf) return LLMCBI_H1_MORE;
    h->line.len = 0;
    if (line->len < 2 || line->ptr[line->len - 2] != '\r' ||
        memchr(line->ptr, '\r', line->len - 2) ||
        memchr(line->ptr, '\0', line->len))
        return LLMCBI_H1_BAD_LINE;
    line->len -= 2;
    return LLMCBI_H1_HEADER;
}

static bool llmcbi_h1_status_line(llmcbi_h1 *h, llmcb_str s)
{
    if (s.len < 12 || s.ptr[8] != ' ' || llmcbi_number(s.ptr + 7, 1) < 0 ||
        (s.len > 12 && s.ptr[12] != ' '))
        return false;
    h->status = (int)llmcbi_number(s.ptr + 9, 3);
    h->close = s.ptr[7] == '0';
    h->interim = h->status < 200;
    return h->status >= 100 && h->status < 600 && h->status != 101;
}

static bool llmcbi_h1_length(llmcbi_h1 *h, llmcb_str s)
{
    int64_t v = llmcbi_number(s.ptr, s.len);

    if (!s.len || s.len > 18 || v < 0) return false;
    if (h->has_length && h->left != (uint64_t)v) return false;
    h->has_length = true;
    h->left = (uint64_t)v;
    return true;
}

static bool llmcbi_has_word(llmcb_str list, const char *word)
{
    size_t i, begin = 0;

    for (i = 0; i <= list.len; i++) {
        llmcb_str item = llmcbi_slice(list.ptr + begin, i - begin);
        if (i < list.len && list.ptr[i] != ',') continue;
        if (llmcbi_str_is_nocase(llmcbi_trim(item), word)) return true;
        begin = i + 1;
    }
    return false;
}

static int llmcbi_h1_header(llmcbi_h1 *h, llmcb_str line, llmcbi_field *field)
{
    if (!llmcbi_h1_field(line, field)) return LLMCBI_H1_BAD_FIELD;
    if (++h->fields > h->max_fields) return LLMCBI_H1_MANY_FIELDS;
    if (h->interim) return LLMCBI_H1_MORE;
    if (llmcbi_str_is_nocase(field->name, "content-length")) {
        if (!llmcbi_h1_length(h, field->value)) return LLMCBI_H1_BAD_LENGTH;
    } else if (llmcbi_str_is_nocase(field->name, "transfer-encoding")) {
        if (!llmcbi_str_is_nocase(field->value, "chunked") || h->chunked)
            return LLMCBI_H1_BAD_CODING;
        h->chunked = true;
    } else if (llmcbi_str_is_nocase(field->name, "connection")) {
        if (llmcbi_has_word(field->value, "close")) h->close_said = true;
        if (llmcbi_has_word(field->value, "keep-alive")) h->close = false;
        if (h->close_said) h->close = true;
    }
    return LLMCBI_H1_HEADER;
}

/* The blank line behind the header fields. */
static int llmcbi_h1_head_end(llmcbi_h1 *h)
{
    if (h->interim) {
        if (++h->interims > LLMCBI_H1_MAX_INTERIM)
            return LLMCBI_H1_MANY_INTERIM;
        h->state = LLMCBI_H1_AT_STATUS;
        h->begun = false;
        return LLMCBI_H1_MORE;
    }
    if (h->chunked && h->has_length) return LLMCBI_H1_TWO_LENGTHS;
    if (h->left > h->max_body) return LLMCBI_H1_LONG_BODY;
    h->state = h->chunked      ? LLMCBI_H1_AT_SIZE
               : h->has_length ? LLMCBI_H1_AT_LENGTH
                               : LLMCBI_H1_AT_CLOSE;
    if (h->status == 204 || h->status == 304 || (h->has_length && !h->left))
        h->state = LLMCBI_H1_AT_END;
    if (h->state == LLMCBI_H1_AT_CLOSE) {
        h->close = true;
        h->left = UINT64_MAX;
    }
    return LLMCBI_H1_MORE;
}

static int llmcbi_h1_body(llmcbi_h1 *h, const char **p, const char *end,
                          llmcb_str *data)
{
    uint64_t n = (uint64_t)(end - *p), room = h->max_body - h->body;

    if (!room) return LLMCBI_H1_LONG_BODY;
    if (n > room) n = room;
    if (n > h->left) n = h->left;
    *data = llmcbi_slice(*p, (size_t)n);
    *p += n;
    h->body += n;
    h->left -= n;
    if (!h->left)
        h->state = h->state == LLMCBI_H1_AT_CHUNK ? LLMCBI_H1_AT_CHUNK_CR
                                                  : LLMCBI_H1_AT_END;
    return LLMCBI_H1_DATA;
}

/* One byte of chunk framing. */
LLMCBI_APART static int llmcbi_h1_frame(llmcbi_h1 *h, char c)
{
    unsigned digit;

    if (++h->framing > LLMCBI_H1_FREE_FRAMING && h->body < h->framing / 3)
        return LLMCBI_H1_MUCH_FRAMING;
    switch (h->state) {
    case LLMCBI_H1_AT_SIZE:
        digit = llmcbi_hex(c);
        if (digit < 16) {
            if (++h->digits > 16) break;
            h->left = h->left << 4 | digit;
            return LLMCBI_H1_MORE;
        }
        if (!h->digits || h->left > INT64_MAX) break;
        if (h->left > h->max_body - h->body) return LLMCBI_H1_LONG_BODY;
        if (c != '\r' && c != ';') break;
        h->state = c == ';' ? LLMCBI_H1_AT_EXTENSION : LLMCBI_H1_AT_SIZE_LF;
        h->extension = 0;
        return LLMCBI_H1_MORE;
    case LLMCBI_H1_AT_EXTENSION:
        if (c == '\n' || c == '\0') break;
        if (c == '\r')
            h->state = LLMCBI_H1_AT_SIZE_LF;
        else if (++h->extension > LLMCBI_H1_MAX_EXTENSION)
            return LLMCBI_H1_LONG_EXTENSION;
        return LLMCBI_H1_MORE;
    case LLMCBI_H1_AT_SIZE_LF:
        if (c != '\n') break;
        h->state = h->left ? LLMCBI_H1_AT_CHUNK : LLMCBI_H1_AT_TRAILER;
        h->digits = 0;
        h->block = 0;
        return LLMCBI_H1_MORE;
    case LLMCBI_H1_AT_CHUNK_CR:
        if (c != '\r') break;
        h->state = LLMCBI_H1_AT_CHUNK_LF;
        return LLMCBI_H1_MORE;
    default: /* LLMCBI_H1_AT_CHUNK_LF */
        if (c != '\n') break;
        h->state = LLMCBI_H1_AT_SIZE;
        return LLMCBI_H1_MORE;
    }
    return LLMCBI_H1_BAD_CHUNK;
}

LLMCBI_APART static int llmcbi_h1_head(const llmcb_allocator *a, llmcbi_h1 *h,
                                       const char **p, const char *end,
                                       llmcbi_field *field)
{
    static const char magic[] = "HTTP/1.";
    size_t seen = h->line.len, n = (size_t)(end - *p);
    llmcb_str line;
    int type;

    /* something else than HTTP need not send a line end to be known */
    if (h->state == LLMCBI_H1_AT_STATUS && seen < 7 &&
        memcmp(*p, magic + seen, n < 7 - seen ? n : 7 - seen) != 0)
        return LLMCBI_H1_NOT_HTTP;
    type = llmcbi_h1_line(a, h, p, end, &line);
    if (type != LLMCBI_H1_HEADER) return type;
    if (h->state == LLMCBI_H1_AT_STATUS) {
        if (!llmcbi_h1_status_line(h, line)) return LLMCBI_H1_BAD_STATUS;
        h->state = LLMCBI_H1_AT_HEADER;
        return h->interim ? LLMCBI_H1_MORE : LLMCBI_H1_STATUS;
    }
    if (h->state == LLMCBI_H1_AT_TRAILER) {
        if (h->block > LLMCBI_H1_MAX_TRAILER) return LLMCBI_H1_LONG_TRAILER;
        if (!line.len) h->state = LLMCBI_H1_AT_END;
        return LLMCBI_H1_MORE;
    }
    return line.len ? llmcbi_h1_header(h, line, field) : llmcbi_h1_head_end(h);
}

#if LLMCBI_QUICK
/* While a chunk is read, memory so far behind it is asked for, so much of it as
 * a token's event has. */
#define LLMCBI_H1_AHEAD 1024
#define LLMCBI_H1_SIGHT 320

/* The data of whole chunks in one go, each from its size to the line end
 * behind it, as far as all of it is there and nothing about it is unusual. */
static size_t llmcbi_h1_chunks(llmcbi_h1 *h, const char **p, const char *end,
                               llmcb_str *data)
{
    const uint64_t most_framing = h->framing + (uint64_t)12 * LLMCBI_H1_PIECES;
    const char *from = *p, *q;
    uint64_t room = h->max_body - h->body, left = room;
    size_t n, i;

    if (h->state != LLMCBI_H1_AT_SIZE || h->digits ||
        (most_framing > LLMCBI_H1_FREE_FRAMING && h->body < most_framing / 3))
        return 0;
    /* room for eight digits and two line ends */
    for (n = 0; n < LLMCBI_H1_PIECES && end - from >= 12; n++) {
        uint64_t size = llmcbi_hex(*from);
        unsigned digit;
        if (size > 15) break;
        for (q = from + 1; (digit = llmcbi_hex(*q)) < 16 && q < from + 8; q++)
            size = size << 4 | digit;
        if (q[0] != '\r' || q[1] != '\n' || !size || size > left ||
            size > (uint64_t)(end - q - 4) || q[2 + size] != '\r' ||
            q[3 + size] != '\n')
            break;
        data[n] = llmcbi_slice(q + 2, (size_t)size);
        if (end - from >= LLMCBI_H1_AHEAD + LLMCBI_H1_SIGHT)
            for (i = 0; i < LLMCBI_H1_SIGHT; i += 64)
                LLMCBI_FETCH(from + LLMCBI_H1_AHEAD + i);
        left -= size;
        from = q + size + 4;
    }
    h->body += room - left;
    h->framing += (uint64_t)(from - *p) - (room - left);
    *p = from;
    return n;
}
#endif

static int llmcbi_h1_fail(llmcbi_h1 *h, int fault)
{
    h->state = LLMCBI_H1_AT_ERROR;
    h->fault = (uint8_t)(fault - LLMCBI_H1_FAULT);
    return LLMCBI_H1_ERROR;
}

typedef struct llmcbi_h1_reason {
    llmcb_code code;
    const char *message;
} llmcbi_h1_reason;

/* Why it failed, or LLMCB_OK. */
static const llmcbi_h1_reason *llmcbi_h1_why(const llmcbi_h1 *h)
{
#define LLMCBI_ENTRY(name, code, text) { code, text },
    static const llmcbi_h1_reason table[] = { { LLMCB_OK, NULL },
                                              LLMCBI_H1_FAULTS(LLMCBI_ENTRY) };
#undef LLMCBI_ENTRY

    return &table[h->fault];
}

/* The next thing in the input; a header or data into *out. After
 * LLMCBI_H1_END, *p shows what is behind the response. Slices are valid until
 * the next call. */
static llmcbi_h1_type llmcbi_h1_next(const llmcb_allocator *a, llmcbi_h1 *h,
                                     const char **p, const char *end,
                                     llmcbi_found *out)
{
    for (;;) {
        int type;
        if (h->state == LLMCBI_H1_AT_END) return LLMCBI_H1_END;
        if (h->state == LLMCBI_H1_AT_ERROR) return LLMCBI_H1_ERROR;
        if (*p == end) return LLMCBI_H1_MORE;
#if LLMCBI_QUICK
        out->n = llmcbi_h1_chunks(h, p, end, out->pieces);
        if (out->n) return LLMCBI_H1_DATA;
#endif
        h->begun = true;
        switch (h->state) {
        case LLMCBI_H1_AT_STATUS:
        case LLMCBI_H1_AT_HEADER:
        case LLMCBI_H1_AT_TRAILER:
            type = llmcbi_h1_head(a, h, p, end, &out->field);
            break;
        case LLMCBI_H1_AT_CLOSE:
        case LLMCBI_H1_AT_LENGTH:
        case LLMCBI_H1_AT_CHUNK:
            type = llmcbi_h1_body(h, p, end, &out->pieces[0]);
            out->n = 1;
            break;
        default: type = llmcbi_h1_frame(h, *(*p)++); break;
        }
        if (type > LLMCBI_H1_ERROR) type = llmcbi_h1_fail(h, type);
        if (type != LLMCBI_H1_MORE) return (llmcbi_h1_type)type;
    }
}

/* What an orderly close of the connection means at this point. */
static llmcb_ending llmcbi_h1_eof(llmcbi_h1 *h)
{
    if (h->state == LLMCBI_H1_AT_CLOSE || h->state == LLMCBI_H1_AT_END)
        return LLMCB_ORDERLY;
    if (h->state > LLMCBI_H1_AT_HEADER) return LLMCB_CUT;
    llmcbi_h1_fail(h, h->state == LLMCBI_H1_AT_HEADER ? LLMCBI_H1_CUT_HEAD
                      : h->begun                      ? LLMCBI_H1_CUT_STATUS
                                                      : LLMCBI_H1_NO_ANSWER);
    return LLMCB_BROKEN;
}

/* Feeds wire bytes to the exchange (NULL: nobody listens any more). Returns
 * LLMCBI_H1_MORE, _END or _ERROR. */
static llmcbi_h1_type llmcbi_h1_drive(llmcb_loop *loop, llmcbi_h1 *h,
                                      llmcb_exchange *x, const char **p,
                                      const char *end)
{
    llmcbi_found found;

    for (;;) {
        llmcbi_h1_type type = llmcbi_h1_next(&loop->alloc, h, p, end, &found);
        if (type == LLMCBI_H1_STATUS)
            llmcb_exchange_status(x, h->status);
        else if (type == LLMCBI_H1_HEADER)
            llmcb_exchange_header(x, found.field.name, found.field.value);
        else if (type == LLMCBI_H1_DATA)
            llmcbi_exchange_pieces(x, found.pieces, found.n);
        else
            return type;
    }
}

static uint32_t llmcbi_u32(size_t n)
{
    return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
}

static void llmcbi_h1_init(llmcbi_h1 *h, const llmcb_limits *limits)
{
    memset(h, 0, sizeof *h);
    h->max_line = llmcbi_u32(limits->header_line);
    h->max_block = llmcbi_u32(limits->header_block);
    h->max_fields = llmcbi_u32(limits->header_fields);
    h->max_body = limits->body;
}
#endif /* LLMCBI_H1 */

/* -- retry rules */

#define LLMCBI_RETRY_CAP ((int64_t)120 * 1000)
#define LLMCBI_NO_WISH ((int64_t)-1)

/* Whole or decimal seconds to milliseconds; LLMCBI_NO_WISH: not a number. */
static int64_t llmcbi_parse_seconds(llmcb_str s, int64_t unit)
{
    int64_t v, digit, part = unit;
    size_t i = 0;

    while (i < s.len && s.ptr[i] != '.')
        i++;
    v = llmcbi_number(s.ptr, i);
    if (!i || v < 0) return LLMCBI_NO_WISH;
    if (v > INT64_MAX / 100000) v = INT64_MAX / 100000;
    v *= unit;
    while (++i < s.len) {
        digit = llmcbi_number(s.ptr + i, 1);
        if (digit < 0) return LLMCBI_NO_WISH;
        part /= 10;
        v += part * digit;
    }
    return v;
}

/* "Tue, 14 Nov 2023 22:13:20 GMT" in seconds since 1970, or -1. */
static int64_t llmcbi_parse_date(llmcb_str s)
{
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    static const short before[] = { 0,   31,  59,  90,  120, 151,
                                    181, 212, 243, 273, 304, 334 };
    static const unsigned char at[] = { 5, 12, 17, 20, 23 };
    int v[5], i, month, year; /* day, year, hour, minute, second */
    int64_t days;

    if (s.len != 29 || memcmp(s.ptr + 25, " GMT", 4) != 0) return -1;
    for (i = 0; i < 5; i++) {
        v[i] = (int)llmcbi_number(s.ptr + at[i], i == 1 ? 4 : 2);
        if (v[i] < 0) return -1;
    }
    year = v[1];
    for (month = 0; month < 12; month++)
        if (memcmp(s.ptr + 8, months + 3 * month, 3) == 0) break;
    if (month == 12 || v[0] < 1 || v[0] > 31 || year < 1970) return -1;
    days = year * 365 + before[month] + v[0] - 719528;
    if (month < 2) year--; /* its leap day is still to come */
    days += year / 4 - year / 100 + year / 400;
    return days * 86400 + v[2] * 3600 + v[3] * 60 + v[4];
}

/* The milliseconds that a Retry-After value asks for. Dates round up. */
LLMCBI_APART static int64_t llmcbi_retry_after(llmcb_str value, int64_t now_ms)
{
    int64_t date, v = llmcbi_parse_seconds(value, 1000);

    if (v >= 0) return v;
    date = llmcbi_parse_date(value);
    if (date < 0) return LLMCBI_NO_WISH;
    v = date * 1000 - now_ms;
    return v > 0 ? (v + 999) / 1000 * 1000 : 0;
}

static bool llmcbi_status_retryable(int status)
{
    return status == 408 || status == 409 || status == 429 || status >= 500;
}

/* 0.5 s doubled up to 8 s, less up to a quarter by chance. */
static int64_t llmcbi_backoff(llmcbi_random *r, int failed_attempts)
{
    int64_t ms = 500;

    while (--failed_attempts > 0 && ms < 8000)
        ms *= 2;
    return ms - (int64_t)(llmcbi_random_next(r) % (uint64_t)(ms / 4));
}

/* How transports keep connections. */
#define LLMCBI_IDLE_MS ((int64_t)30 * 1000)      /* then it is closed */
#define LLMCBI_LIFE_MS ((int64_t)10 * 60 * 1000) /* then it is not reused */
#define LLMCBI_LINGER_MS 100 /* for the rest of a response, for reuse */
#define LLMCBI_LINGER_BYTES 16384
#define LLMCBI_MAX_IDLE 64
#define LLMCBI_CONNECT_AGAIN_MS 10 /* a unix socket's queue was full */

/* ==== [SOCK] transport: plain HTTP/1.1 over TCP and unix sockets ======= */

#ifdef LLMCB_NO_SOCKETS
LLMCBI_DEF llmcb_transport *llmcb_socket_transport(llmcb_loop *loop)
{
    (void)loop;
    return NULL;
}
#else

#ifdef MSG_NOSIGNAL
#define LLMCBI_NOSIGNAL MSG_NOSIGNAL
#else
#define LLMCBI_NOSIGNAL 0
#endif

typedef enum llmcbi_conn_state {
    LLMCBI_CONN_NEW, /* begins in the next turn */
    LLMCBI_CONN_RESOLVING,
    LLMCBI_CONN_CONNECTING,
    LLMCBI_CONN_ACTIVE,
    LLMCBI_CONN_LINGERING, /* reading what nobody wants */
    LLMCBI_CONN_IDLE
} llmcbi_conn_state;

typedef struct llmcbi_sock llmcbi_sock;
typedef struct llmcbi_conn llmcbi_conn;

/* A connection, with the exchange that it serves at the moment. */
struct llmcbi_conn {
    /* First what each read looks at, so that it is in one place. */
    llmcbi_watch watch; /* fd -1: not connected */
    uint8_t state;
    bool reused;   /* its descriptor has served another exchange */
    bool replayed; /* a reused one has failed already */
    int sys_errno; /* why the last address failed */
    llmcbi_sock *sock;
    llmcb_exchange *x;            /* NULL: lingering or idle */
    const llmcb_request *request; /* of x, until it is sent and answered */
    const char *hot;              /* what x's owner will look at */
    size_t sent;                  /* of head and body together */
    llmcbi_buf head;              /* request head, until it is sent */
    llmcbi_timer timer;           /* connect share, linger or idle */
    llmcbi_ready ready;
    llmcbi_h1 h1;

    llmcbi_link link; /* of the transport's, in use or idle */
    llmcbi_job *dns;
    struct addrinfo *addresses, *address; /* all, and the one tried */
    int64_t born;
    uint64_t identity;
    uint32_t lingered;
    char key[1]; /* the address without its path: who may share it */
};

struct llmcbi_sock {
    llmcb_transport base;
    llmcbi_link *conns, *idle; /* in use, and not */
    size_t n_idle;
};

static llmcb_loop *llmcbi_conn_loop(const llmcbi_conn *c)
{
    return c->sock->base.loop;
}

static void llmcbi_conn_disconnect(llmcbi_conn *c)
{
    if (c->watch.fd < 0) return;
    llmcbi_watch_set(llmcbi_conn_loop(c), &c->watch, 0);
    LLMCBI_SYS(close)(c->watch.fd);
    c->watch.fd = -1;
}

static void llmcbi_conn_wipe_head(llmcbi_conn *c)
{
    llmcbi_wipe(c->head.ptr, c->head.cap);
    llmcbi_buf_free(&llmcbi_conn_loop(c)->alloc, &c->head);
}

static void llmcbi_conn_free(llmcbi_conn *c)
{
    const llmcb_allocator *a = &llmcbi_conn_loop(c)->alloc;

    if (c->state == LLMCBI_CONN_IDLE) c->sock->n_idle--;
    llmcbi_conn_disconnect(c);
    if (c->dns) c->dns->owner = NULL;
    if (c->addresses) freeaddrinfo(c->addresses);
    llmcbi_unready(&c->ready);
    llmcbi_timer_free(llmcbi_conn_loop(c), &c->timer);
    llmcbi_conn_wipe_head(c);
    llmcbi_h1_free(a, &c->h1);
    llmcbi_link_out(&c->link);
    llmcbi_free(a, c, sizeof *c + strlen(c->key));
}

static llmcbi_conn **llmcbi_conn_slot(llmcb_exchange *x)
{
    return (llmcbi_conn **)(void *)((char *)x + LLMCBI_EXCHANGE_HEAD);
}

/* The end of the connection, and of an exchange that it serves. */
static void llmcbi_conn_end(llmcbi_conn *c, llmcb_code code,
                            const char *message, llmcb_ending ending)
{
    llmcb_exchange *x = c->x;
    char digits[24];
    llmcb_error e;

    llmcbi_error_set(&e, code, message);
    if (code != LLMCB_OK && c->sys_errno) {
        e.sys_errno = c->sys_errno;
        llmcbi_error_add(&e, ", errno ", 8);
        message = llmcbi_decimal(digits, c->sys_errno);
        llmcbi_error_add(&e, message, strlen(message));
    }
    llmcbi_conn_free(c);
    llmcbi_exchange_over(x, ending, &e);
}

static void llmcbi_conn_fail(llmcbi_conn *c, llmcb_code code,
                             const char *message)
{
    llmcbi_conn_end(c, code, message, LLMCB_BROKEN);
}

/* When it can be sent, since many may be connecting. */
LLMCBI_APART static void llmcbi_conn_write_head(llmcbi_conn *c)
{
    const llmcb_allocator *a = &llmcbi_conn_loop(c)->alloc;
    llmcbi_buf *b = &c->head;
    const llmcb_request *q = c->request;
    const llmcb_pair *h = q->headers, *last = h + q->n_headers;
    llmcbi_url u;
    size_t size;

    llmcbi_url_parse(&u, q->url); /* which has been tried */
    size = 256 + u.target.len + u.authority.len;
    for (; h < last; h++)
        size += strlen(h->key) + strlen(h->value) + 4;
    /* in one piece, so that no copy of the key stays behind */
    if (!llmcbi_buf_reserve(a, b, size)) return;
    llmcbi_buf_print(a, b,
                     "%s %S HTTP/1.1\r\nHost: %S\r\nContent-Length: %d\r\n",
                     q->method, &u.target, &u.authority, (int64_t)q->body_len);
    for (h = q->headers; h < last; h++)
        llmcbi_buf_print(a, b, "%s: %s\r\n", h->key, h->value);
    llmcbi_buf_text(a, b, "\r\n");
}

static bool llmcbi_conn_unsent(const llmcbi_conn *c)
{
    return c->request && c->sent < c->head.len + c->request->body_len;
}

/* What this connection is to be told of. */
static void llmcbi_conn_watch(llmcbi_conn *c)
{
    int events = 0;
    llmcb_code code;

    if (c->state == LLMCBI_CONN_CONNECTING)
        events = LLMCB_WRITE;
    else if (c->state != LLMCBI_CONN_IDLE)
        events = (c->x && c->x->paused ? 0 : LLMCB_READ) |
                 (llmcbi_conn_unsent(c) ? LLMCB_WRITE : 0);
    code = llmcbi_watch_set(llmcbi_conn_loop(c), &c->watch, events);
    if (code == LLMCB_OK) return;
    if (code == LLMCB_ESYS) c->sys_errno = errno;
    llmcbi_conn_fail(c, code,
                     code == LLMCB_ESYS ? "a socket cannot be watched" : NULL);
}

/* false: the connection is gone. */
static bool llmcbi_conn_send(llmcbi_conn *c)
{
    size_t head = c->head.len, all = head + c->request->body_len;

    while (c->sent < all) { /* both in one call: mostly one packet */
        size_t left = c->sent < head ? head - c->sent : 0; /* of the head */
        struct iovec parts[2];
        struct msghdr m;
        ssize_t n;
        memset(&m, 0, sizeof m);
        m.msg_iov = parts;
        m.msg_iovlen = 2;
        parts[0].iov_base = c->head.ptr + head - left;
        parts[0].iov_len = left;
        parts[1].iov_len = all - left - c->sent;
        parts[1].iov_base = llmcbi_unconst(
            c->request->body + c->request->body_len - parts[1].iov_len);
        n = LLMCBI_SYS(sendmsg)(c->watch.fd, &m, LLMCBI_NOSIGNAL);
        if (n > 0) {
            c->sent += (size_t)n;
            continue;
        }
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        c->sys_errno = errno;
        if (errno != EPIPE && errno != ECONNRESET) {
            /* the server knows nothing of it, and would wait */
            llmcbi_conn_fail(
                c, llmcbi_errno_is_local(errno) ? LLMCB_ESYS : LLMCB_EIO,
                "the request could not be sent");
            return false;
        }
        /* The server may have answered and closed: what it said comes with
         * the next read, or the read fails too. */
        c->sent = all;
    }
    c->sent -= head;
    llmcbi_conn_wipe_head(c);
    return true;
}

static void llmcbi_conn_established(llmcbi_conn *c)
{
    llmcbi_timer_stop(llmcbi_conn_loop(c), &c->timer);
    if (c->addresses) freeaddrinfo(c->addresses);
    c->addresses = c->address = NULL;
    c->state = LLMCBI_CONN_ACTIVE;
    c->sys_errno = 0;
    llmcb_exchange_connected(c->x);
    llmcbi_conn_write_head(c);
    if (c->head.failed)
        llmcbi_conn_fail(c, LLMCB_ENOMEM, NULL);
    else if (llmcbi_conn_send(c))
        llmcbi_conn_watch(c);
}

/* A non-blocking socket that begins to connect. */
static int llmcbi_connect(const struct sockaddr *addr, socklen_t len)
{
    int one = 1, saved, fd;

#if defined(SOCK_NONBLOCK) && defined(SOCK_CLOEXEC)
    fd = LLMCBI_SYS(socket)(addr->sa_family,
                            SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
#else
    fd = LLMCBI_SYS(socket)(addr->sa_family, SOCK_STREAM, 0);
    if (fd < 0) return -1;
    if (!llmcbi_cloexec_nonblock(fd)) goto fail;
#endif
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
    if (addr->sa_family != AF_UNIX)
        LLMCBI_SYS(setsockopt)(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (LLMCBI_SYS(connect)(fd, addr, len) == 0 || errno == EINPROGRESS ||
        errno == EINTR)
        return fd;
#if !defined(SOCK_NONBLOCK) || !defined(SOCK_CLOEXEC)
fail:
#endif
    saved = errno;
    LLMCBI_SYS(close)(fd);
    errno = saved;
    return -1;
}

/* LLMCB_ESYS: this machine is short of something. */
static llmcb_code
llmcbi_conn_connect(llmcbi_conn *c, const struct sockaddr *addr, socklen_t len)
{
    c->watch.fd = llmcbi_connect(addr, len);
    if (c->watch.fd >= 0) {
        c->state = LLMCBI_CONN_CONNECTING;
        return LLMCB_OK;
    }
    c->sys_errno = errno;
    return llmcbi_errno_is_local(errno) ? LLMCB_ESYS : LLMCB_ECONNECT;
}

/* On the same machine a connection is mostly there at once, though connect says
 * that it is in progress. Else it is waited for. */
static bool llmcbi_conn_is_there(const llmcbi_conn *c)
{
    struct sockaddr peer;
    socklen_t len = sizeof peer;

    return LLMCBI_SYS(getpeername)(c->watch.fd, &peer, &len) == 0;
}

/* What follows llmcbi_conn_connect. */
LLMCBI_APART static void llmcbi_conn_tried(llmcbi_conn *c, llmcb_code code,
                                           const char *message)
{
    if (code != LLMCB_OK)
        llmcbi_conn_fail(
            c, code, code == LLMCB_ESYS ? "no socket could be made" : message);
    else if (LLMCBI_QUICK && llmcbi_conn_is_there(c))
        llmcbi_conn_established(c);
    else
        llmcbi_conn_watch(c);
}

/* Tries addresses from c->address on, until one is on its way. */
static void llmcbi_conn_try(llmcbi_conn *c)
{
    llmcb_code code = LLMCB_ECONNECT;
    struct addrinfo *ai;
    int64_t left = 0;

    for (; (ai = c->address); c->address = ai->ai_next) {
        code = llmcbi_conn_connect(c, ai->ai_addr, ai->ai_addrlen);
        if (code != LLMCB_ECONNECT) break;
    }
    /* an address that does not answer leaves time for the others */
    for (; ai; ai = ai->ai_next)
        left++;
    if (left > 1 && c->request->connect_ms > 0)
        llmcbi_timer_start(llmcbi_conn_loop(c), &c->timer,
                           c->request->connect_ms / left);
    llmcbi_conn_tried(c, code, NULL);
}

static void llmcbi_conn_connect_unix(llmcbi_conn *c, llmcb_str path)
{
    struct sockaddr_un addr;
    llmcb_code code;

    memset(&addr, 0, sizeof addr);
    addr.sun_family = AF_UNIX;
    if (path.len >= sizeof addr.sun_path) {
        llmcbi_conn_fail(c, LLMCB_EINVAL, "the socket's path is too long");
        return;
    }
    memcpy(addr.sun_path, path.ptr, path.len);
    code = llmcbi_conn_connect(c, (const struct sockaddr *)(const void *)&addr,
                               (socklen_t)sizeof addr);
    /* Linux: the listener's queue is full; no poll tells when it is not, so
     * ask again */
    if (code == LLMCB_ECONNECT && c->sys_errno == EAGAIN)
        llmcbi_timer_start(llmcbi_conn_loop(c), &c->timer,
                           LLMCBI_CONNECT_AGAIN_MS);
    else
        llmcbi_conn_tried(c, code, "could not connect to the socket");
}

/* -- names: the system's resolver blocks, so it runs on the pool */

typedef struct llmcbi_dns {
    struct addrinfo hints, *found;
    size_t size;
    const char *port;
    char digits[24]; /* of it */
    char host[1];    /* and more */
} llmcbi_dns;

static int llmcbi_dns_work(void *arg)
{
    llmcbi_dns *d = (llmcbi_dns *)arg;

    return LLMCBI_SYS(getaddrinfo)(d->host, d->port, &d->hints, &d->found);
}

static void llmcbi_dns_done(llmcbi_job *job)
{
    llmcbi_dns *d = (llmcbi_dns *)job->arg;
    llmcbi_conn *c = (llmcbi_conn *)job->owner;

    if (c) {
        c->dns = NULL;
        if (job->result == 0) {
            c->addresses = c->address = d->found;
            d->found = NULL;
            llmcbi_conn_try(c);
        } else {
            llmcbi_conn_fail(c, LLMCB_EDNS, NULL);
        }
    }
    if (d->found) freeaddrinfo(d->found);
    llmcbi_free(&job->loop->alloc, d, d->size);
}

static void llmcbi_conn_resolve(llmcbi_conn *c, const llmcbi_url *u)
{
    llmcb_loop *loop = llmcbi_conn_loop(c);
    size_t size = sizeof(llmcbi_dns) + u->host.len;
    llmcbi_dns *d = (llmcbi_dns *)llmcbi_alloc(&loop->alloc, size);
    llmcb_code code;

    if (!d) {
        llmcbi_conn_fail(c, LLMCB_ENOMEM, NULL);
        return;
    }
    d->size = size;
    memcpy(d->host, u->host.ptr, u->host.len);
    d->port = llmcbi_decimal(d->digits, u->port);
    d->hints.ai_family = AF_UNSPEC;
    d->hints.ai_socktype = SOCK_STREAM;
    d->hints.ai_flags = AI_NUMERICHOST;
    if (llmcbi_dns_work(d) == 0) {
        c->addresses = c->address = d->found;
        llmcbi_free(&loop->alloc, d, size);
        llmcbi_conn_try(c);
        return;
    }
    d->found = NULL;
    d->hints.ai_flags = 0;
    c->state = LLMCBI_CONN_RESOLVING;
    c->dns =
        llmcbi_job_start(loop, llmcbi_dns_work, d, llmcbi_dns_done, c, &code);
    if (c->dns) return;
    llmcbi_free(&loop->alloc, d, size);
    if (code == LLMCB_ESYS) c->sys_errno = loop->pool_errno;
    llmcbi_conn_fail(c, code, "no thread to resolve the host name");
}

/* -- life of a connection */

/* An idle connection to the same place for the same client, that the server
 * has not closed. */
static llmcbi_conn *llmcbi_conn_find_idle(llmcbi_conn *c)
{
    llmcbi_link *l, *next;

    for (l = c->sock->idle; l; l = next) {
        llmcbi_conn *i = LLMCBI_OWNER(llmcbi_conn, link, l);
        char byte;
        next = l->next;
        if (i->identity != c->identity || strcmp(i->key, c->key) != 0) continue;
        if (LLMCBI_SYS(recv)(i->watch.fd, &byte, 1, MSG_PEEK) < 0 &&
            (errno == EAGAIN || errno == EWOULDBLOCK) &&
            llmcbi_conn_loop(c)->now - i->born < LLMCBI_LIFE_MS)
            return i;
        llmcbi_conn_free(i);
    }
    return NULL;
}

/* Takes over the descriptor of an idle connection. */
static void llmcbi_conn_adopt(llmcbi_conn *c, llmcbi_conn *idle)
{
    c->watch.fd = idle->watch.fd;
    c->born = idle->born;
    c->reused = true;
    idle->watch.fd = -1;
    llmcbi_conn_free(idle);
    llmcbi_conn_established(c);
}

static void llmcbi_conn_begin(llmcbi_ready *r)
{
    llmcbi_conn *c = LLMCBI_OWNER(llmcbi_conn, ready, r), *idle;
    llmcbi_url u;

    if (llmcbi_url_parse(&u, c->request->url)) {
        llmcbi_conn_fail(c, LLMCB_EINVAL, "a bad address");
        return;
    }
    if (u.tls) {
        llmcbi_conn_fail(c, LLMCB_ETLS,
                         "the socket transport has no TLS: https:// needs "
                         "libcurl, built without LLMCB_NO_CURL");
        return;
    }
    llmcbi_h1_free(&llmcbi_conn_loop(c)->alloc, &c->h1);
    llmcbi_h1_init(&c->h1, c->request->limits);
    llmcbi_conn_wipe_head(c);
    c->sent = 0;
    c->born = llmcbi_conn_loop(c)->now;
    idle = c->replayed ? NULL : llmcbi_conn_find_idle(c);
    if (idle)
        llmcbi_conn_adopt(c, idle);
    else if (u.unix_path.len)
        llmcbi_conn_connect_unix(c, u.unix_path);
    else
        llmcbi_conn_resolve(c, &u);
}

/* A kept connection died before it answered: once more on a new one. */
LLMCBI_APART static bool llmcbi_conn_replay(llmcbi_conn *c)
{
    if (!c->x || !c->request || !c->reused || c->h1.begun) return false;
    llmcbi_conn_disconnect(c);
    c->state = LLMCBI_CONN_NEW;
    c->reused = false;
    c->replayed = true;
    c->sys_errno = 0;
    llmcbi_make_ready(llmcbi_conn_loop(c), &c->ready);
    llmcbi_exchange_again(c->x);
    return true;
}

static void llmcbi_conn_keep(llmcbi_conn *c)
{
    c->x = NULL;
    c->request = NULL;
    if (c->h1.close || c->sock->n_idle >= LLMCBI_MAX_IDLE) {
        llmcbi_conn_free(c);
        return;
    }
    llmcbi_h1_free(&llmcbi_conn_loop(c)->alloc, &c->h1);
    c->state = LLMCBI_CONN_IDLE;
    c->sock->n_idle++;
    llmcbi_link_out(&c->link);
    llmcbi_link_in(&c->sock->idle, &c->link);
    llmcbi_conn_watch(c);
    llmcbi_timer_start(llmcbi_conn_loop(c), &c->timer, LLMCBI_IDLE_MS);
}

/* An address has failed, or it does not answer. */
static void llmcbi_conn_try_next(llmcbi_conn *c, int failed)
{
    llmcbi_timer_stop(llmcbi_conn_loop(c), &c->timer);
    llmcbi_conn_disconnect(c);
    c->sys_errno = failed;
    if (c->address) c->address = c->address->ai_next;
    llmcbi_conn_try(c);
}

static void llmcbi_conn_timer(llmcbi_timer *t)
{
    llmcbi_conn *c = LLMCBI_OWNER(llmcbi_conn, timer, t);

    if (c->state == LLMCBI_CONN_NEW)
        llmcbi_make_ready(llmcbi_conn_loop(c), &c->ready);
    else if (c->state == LLMCBI_CONN_CONNECTING)
        llmcbi_conn_try_next(c, ETIMEDOUT);
    else
        llmcbi_conn_free(c); /* lingered or idled long enough */
}

/* The answer is over; the parser knows why. */
static void llmcbi_conn_answered(llmcbi_conn *c, llmcb_ending ending)
{
    const llmcbi_h1_reason *why = llmcbi_h1_why(&c->h1);

    llmcbi_conn_end(c, why->code, why->message, ending);
}

static void llmcbi_conn_received(llmcbi_conn *c, const char *p, size_t n)
{
    const char *end = p + n;
    llmcbi_h1_type type;

    if (c->request && !llmcbi_conn_unsent(c)) {
        c->request = NULL;
        llmcb_exchange_sent(c->x);
    }
    type = llmcbi_h1_drive(llmcbi_conn_loop(c), &c->h1, c->x, &p, end);
    if (type == LLMCBI_H1_ERROR) {
        c->sys_errno = 0;
        llmcbi_conn_answered(c, LLMCB_BROKEN);
    } else if (type == LLMCBI_H1_END) {
        llmcb_exchange *x = c->x;
        /* bytes behind a response belong to nobody */
        if (p < end || llmcbi_conn_unsent(c)) c->h1.close = true;
        llmcbi_conn_keep(c);
        llmcbi_exchange_over(x, LLMCB_ORDERLY, llmcbi_error_const(LLMCB_OK));
    } else if (!c->x && (c->lingered += (uint32_t)n) > LLMCBI_LINGER_BYTES) {
        llmcbi_conn_free(c);
    } else {
        llmcbi_conn_watch(c);
    }
}

static void llmcbi_conn_read(llmcbi_conn *c)
{
    llmcb_loop *loop = llmcbi_conn_loop(c);
    ssize_t n;

    if (!loop->scratch) {
        loop->scratch = llmcbi_resize(&loop->alloc, NULL, 0, LLMCBI_SCRATCH);
        if (!loop->scratch) {
            llmcbi_conn_fail(c, LLMCB_ENOMEM, NULL);
            return;
        }
    }
    if (c->x) {
        LLMCBI_FETCH(&c->h1);
        llmcbi_exchange_fetch(c->x, c->hot);
    }
    n = LLMCBI_SYS(recv)(c->watch.fd, loop->scratch, LLMCBI_SCRATCH, 0);
    if (n > 0) {
        llmcbi_conn_received(c, (const char *)loop->scratch, (size_t)n);
        return;
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (n < 0) c->sys_errno = errno;
    if (llmcbi_conn_replay(c)) return;
    if (n < 0) {
        llmcbi_conn_fail(c, LLMCB_EIO, NULL);
        return;
    }
    llmcbi_conn_answered(c, llmcbi_h1_eof(&c->h1));
}

static void llmcbi_conn_connecting(llmcbi_conn *c)
{
    int failed = 0;
    socklen_t len = sizeof failed;

    if (LLMCBI_SYS(getsockopt)(c->watch.fd, SOL_SOCKET, SO_ERROR, &failed,
                               &len) != 0)
        failed = errno;
    if (failed)
        llmcbi_conn_try_next(c, failed);
    else
        llmcbi_conn_established(c);
}

static void llmcbi_conn_event(llmcbi_watch *w, int events)
{
    llmcbi_conn *c = LLMCBI_OWNER(llmcbi_conn, watch, w);

    if (c->state == LLMCBI_CONN_CONNECTING) {
        llmcbi_conn_connecting(c);
        return;
    }
    if (events & LLMCB_WRITE) {
        if (!llmcbi_conn_send(c)) return;
        if (!(events & LLMCB_READ)) llmcbi_conn_watch(c);
    }
    if (events & LLMCB_READ) llmcbi_conn_read(c);
}

static llmcb_code llmcbi_sock_start(llmcb_transport *tr, llmcb_exchange *x,
                                    const llmcb_request *request)
{
    llmcbi_sock *sock = (llmcbi_sock *)(void *)tr;
    llmcb_loop *loop = tr->loop;
    llmcbi_conn *c;
    const char *end = strstr(request->url, "://");
    size_t n;

    if (end) end = strchr(end + 3, '/');
    n = end ? (size_t)(end - request->url) : strlen(request->url);
    c = (llmcbi_conn *)llmcbi_alloc(&loop->alloc, sizeof *c + n);
    if (!c) return LLMCB_ENOMEM;
    memcpy(c->key, request->url, n); /* it is freed by its length */
    c->sock = sock;
    c->watch.fd = -1;
    c->x = x;
    c->hot = (const char *)x->owner + x->sink->hot;
    c->request = request;
    c->identity = request->identity;
    c->ready.fn = llmcbi_conn_begin;
    c->watch.fn = llmcbi_conn_event;
    llmcbi_link_in(&sock->conns, &c->link);
    if (!llmcbi_timer_init(loop, &c->timer, llmcbi_conn_timer)) {
        llmcbi_conn_free(c);
        return LLMCB_ENOMEM;
    }
    *llmcbi_conn_slot(x) = c;
    llmcbi_make_ready(loop, &c->ready);
    return LLMCB_OK;
}

static void llmcbi_sock_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    llmcbi_conn_watch(*llmcbi_conn_slot(x));
}

static void llmcbi_sock_cancel(llmcb_transport *tr, llmcb_exchange *x)
{
    llmcbi_conn *c = *llmcbi_conn_slot(x);
    struct linger hard;
    int fd = c->watch.fd;

    (void)tr;
    c->x = NULL;
    hard.l_onoff = 1;
    hard.l_linger = 0; /* a reset: the server need not write to learn it */
    if (fd >= 0)
        LLMCBI_SYS(setsockopt)(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
    llmcbi_conn_free(c);
}

static void llmcbi_sock_release(llmcb_transport *tr, llmcb_exchange *x)
{
    llmcbi_conn *c = *llmcbi_conn_slot(x);

    if (c->state != LLMCBI_CONN_ACTIVE || llmcbi_conn_unsent(c)) {
        llmcbi_sock_cancel(tr, x);
        return;
    }
    c->x = NULL;
    c->request = NULL;
    c->state = LLMCBI_CONN_LINGERING;
    llmcbi_timer_start(tr->loop, &c->timer, LLMCBI_LINGER_MS);
    llmcbi_conn_watch(c);
}

/* In the child of a fork. */
static void llmcbi_conns_forked(llmcbi_link *l)
{
    for (; l; l = l->next) {
        llmcbi_conn *c = LLMCBI_OWNER(llmcbi_conn, link, l);
        if (c->watch.fd >= 0) LLMCBI_SYS(close)(c->watch.fd);
    }
}

static void llmcbi_sock_free(llmcb_transport *tr)
{
    llmcbi_sock *sock = (llmcbi_sock *)(void *)tr;

    while (sock->conns || sock->idle)
        llmcbi_conn_free(LLMCBI_OWNER(llmcbi_conn, link,
                                      sock->conns ? sock->conns : sock->idle));
    llmcbi_free(&tr->loop->alloc, sock, sizeof *sock);
}

static const llmcb_transport llmcbi_sock_transport = { sizeof(llmcbi_conn *),
                                                       llmcbi_sock_start,
                                                       llmcbi_sock_resume,
                                                       llmcbi_sock_release,
                                                       llmcbi_sock_cancel,
                                                       llmcbi_sock_free,
                                                       NULL,
                                                       NULL };

LLMCBI_DEF llmcb_transport *llmcb_socket_transport(llmcb_loop *loop)
{
    llmcbi_sock *sock;

    if (llmcbi_enter(loop) != LLMCB_OK) return NULL;
    sock = (llmcbi_sock *)llmcbi_alloc(&loop->alloc, sizeof *sock);
    if (!sock) return NULL;
    sock->base = llmcbi_sock_transport;
    sock->base.loop = loop;
    llmcb_transport_init(loop, &sock->base);
    return &sock->base;
}
#endif /* LLMCB_NO_SOCKETS */

/* ==== [CURL] transport: libcurl's multi interface on the loop ========== */

#ifdef LLMCB_NO_CURL
LLMCBI_DEF llmcb_transport *llmcb_curl_transport(llmcb_loop *loop)
{
    (void)loop;
    return NULL;
}
#else

typedef struct llmcbi_curl llmcbi_curl;
typedef struct llmcbi_transfer llmcbi_transfer;

/* One easy handle. It may outlive its exchange by 100 ms, reading the rest
 * of the response so that the connection can be kept. */
struct llmcbi_transfer {
    llmcbi_link link;
    llmcbi_curl *curl;
    llmcb_exchange *x; /* NULL: lingering */
    CURL *easy;
    uint64_t body_left; /* of limits.body */
    bool held;          /* libcurl waits for curl_easy_pause */
    bool in_body;
    bool by_path; /* to a unix socket */
    struct curl_slist *headers;
    llmcbi_timer timer;
    llmcb_limits limits;
    size_t line, block, fields, interims, lingered;
    size_t request_len;
    int status;
    int open_errno;  /* why there is no socket */
    int watch_errno; /* why it cannot be watched */
    llmcb_code code; /* why a callback of ours stopped it */
    const char *message;
    char error[CURL_ERROR_SIZE];
};

/* A descriptor of libcurl's. */
typedef struct llmcbi_curl_fd {
    llmcbi_watch watch;
    llmcbi_curl *curl;
    const llmcbi_transfer *t; /* who had it last: to fetch, as the next two */
    const llmcb_exchange *x;
    const char *hot;
    llmcbi_link link;
} llmcbi_curl_fd;

struct llmcbi_curl {
    llmcb_transport base;
    CURLM *multi;
    llmcbi_timer timer;
    llmcbi_link *transfers, *fds;
    curl_socket_t idle[LLMCBI_MAX_IDLE]; /* where a response ended last */
    size_t n_idle;
    bool tls; /* some request was for https:// */
};

/* TLS libraries write without MSG_NOSIGNAL: SIGPIPE is blocked meanwhile,
 * and one that we caused is taken away. */
typedef struct llmcbi_sigpipe {
    sigset_t before;
    bool was_pending;
    bool blocked; /* there is TLS: it matters */
} llmcbi_sigpipe;

static bool llmcbi_sigpipe_pending(void)
{
    sigset_t pending;

    sigemptyset(&pending);
    sigpending(&pending);
    return sigismember(&pending, SIGPIPE) == 1;
}

static void llmcbi_sigpipe_block(const llmcbi_curl *c, llmcbi_sigpipe *s)
{
    sigset_t set;

    s->blocked = c->tls;
    if (!s->blocked) return;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, &s->before);
    /* one that was not blocked before cannot have been waiting */
    s->was_pending =
        sigismember(&s->before, SIGPIPE) == 1 && llmcbi_sigpipe_pending();
}

static void llmcbi_sigpipe_restore(const llmcbi_sigpipe *s)
{
    sigset_t set;
    int sig;

    if (!s->blocked) return;
    if (!s->was_pending && llmcbi_sigpipe_pending()) {
        sigemptyset(&set);
        sigaddset(&set, SIGPIPE);
        sigwait(&set, &sig);
    }
    pthread_sigmask(SIG_SETMASK, &s->before, NULL);
}

static llmcbi_transfer **llmcbi_transfer_slot(llmcb_exchange *x)
{
    return (llmcbi_transfer **)llmcb_exchange_state(x);
}

/* Not inside a callback of libcurl's. */
static void llmcbi_transfer_free(llmcbi_transfer *t)
{
    llmcb_loop *loop = t->curl->base.loop;
    llmcbi_sigpipe pipe_state;

    llmcbi_sigpipe_block(t->curl, &pipe_state);
    if (t->easy) {
        curl_multi_remove_handle(t->curl->multi, t->easy);
        curl_easy_cleanup(t->easy);
    }
    llmcbi_sigpipe_restore(&pipe_state);
    curl_slist_free_all(t->headers);
    llmcbi_timer_free(loop, &t->timer);
    llmcbi_link_out(&t->link);
    llmcbi_free(&loop->alloc, t, sizeof *t);
}

static size_t llmcbi_transfer_stop(llmcbi_transfer *t, llmcb_code code,
                                   const char *message)
{
    t->code = code;
    t->message = message;
    return 0; /* libcurl then ends with CURLE_WRITE_ERROR */
}

/* One header line, with the limits that libcurl does not have. */
static size_t llmcbi_transfer_header(char *ptr, size_t one, size_t len,
                                     void *user)
{
    llmcbi_transfer *t = (llmcbi_transfer *)user;
    llmcb_str line = llmcbi_slice(ptr, len * one);
    llmcbi_field field;

    len = line.len;
    if (t->in_body) return len; /* a trailer */
    t->block += len;
    if (len > t->limits.header_line)
        return llmcbi_transfer_stop(t, LLMCB_ELIMIT,
                                    "a header line exceeds limits.header_line");
    if (t->block > t->limits.header_block)
        return llmcbi_transfer_stop(
            t, LLMCB_ELIMIT, "the response head exceeds limits.header_block");
    while (line.len &&
           (line.ptr[line.len - 1] == '\n' || line.ptr[line.len - 1] == '\r'))
        line.len--;
    if (line.len >= 9 && memcmp(line.ptr, "HTTP/", 5) == 0) {
        const char *sp = (const char *)memchr(line.ptr, ' ', line.len);
        t->status =
            sp && sp + 3 < line.ptr + line.len
                ? (sp[1] - '0') * 100 + (sp[2] - '0') * 10 + (sp[3] - '0')
                : 0;
        if (t->status < 200 && ++t->interims > LLMCBI_H1_MAX_INTERIM)
            return llmcbi_transfer_stop(t, LLMCB_ELIMIT,
                                        "too many interim responses");
        /* a proxy's answer to CONNECT is not the response */
        if (t->status >= 200) llmcb_exchange_status(t->x, t->status);
        return len;
    }
    if (!line.len) return len;
    if (++t->fields > t->limits.header_fields)
        return llmcbi_transfer_stop(
            t, LLMCB_ELIMIT, "more header fields than limits.header_fields");
    if (t->status >= 200 && llmcbi_h1_field(line, &field))
        llmcb_exchange_header(t->x, field.name, field.value);
    return len;
}

static size_t llmcbi_transfer_data(char *ptr, size_t one, size_t len,
                                   void *user)
{
    llmcbi_transfer *t = (llmcbi_transfer *)user;

    len *= one;
    t->in_body = true;
    if (!t->x) {
        t->lingered += len;
        return t->lingered > LLMCBI_LINGER_BYTES ? 0 : len;
    }
    if (t->x->paused) {
        t->held = true;
        return CURL_WRITEFUNC_PAUSE;
    }
    if (len > t->body_left)
        return llmcbi_transfer_stop(t, LLMCB_ELIMIT,
                                    "the response exceeds limits.body");
    t->body_left -= len;
    llmcb_exchange_data(t->x, ptr, len);
    return len;
}

/* The request is about to be sent. */
#if LIBCURL_VERSION_NUM >= 0x075000
static int llmcbi_transfer_connected(void *user, char *remote, char *local,
                                     int remote_port, int local_port)
{
    llmcbi_transfer *t = (llmcbi_transfer *)user;

    (void)remote;
    (void)local;
    (void)remote_port;
    (void)local_port;
    llmcb_exchange_connected(t->x);
    return CURL_PREREQFUNC_OK;
}
#else
static int llmcbi_transfer_connected(CURL *easy, curl_infotype type, char *data,
                                     size_t len, void *user)
{
    llmcbi_transfer *t = (llmcbi_transfer *)user;

    (void)easy;
    /* a proxy is asked first */
    if (type == CURLINFO_HEADER_OUT &&
        (len < 8 || memcmp(data, "CONNECT ", 8) != 0))
        llmcb_exchange_connected(t->x);
    return 0;
}
#endif

static curl_socket_t llmcbi_curl_open(void *user, curlsocktype purpose,
                                      struct curl_sockaddr *addr)
{
    llmcbi_transfer *t = (llmcbi_transfer *)user;
    curl_socket_t fd;

    (void)purpose;
    fd = LLMCBI_SYS(socket)(addr->family, addr->socktype, addr->protocol);
    t->open_errno = fd < 0 ? errno : 0; /* libcurl does not keep it */
    llmcbi_exchange_again(t->x);
    if (fd >= 0) LLMCBI_SYS(fcntl)(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

static int llmcbi_curl_close(void *user, curl_socket_t fd)
{
    llmcbi_curl *c = (llmcbi_curl *)user;
    size_t i;

    for (i = 0; i < c->n_idle; i++)
        if (c->idle[i] == fd) c->idle[i--] = c->idle[--c->n_idle];
    return LLMCBI_SYS(close)(fd);
}

/* Remembers where a response has ended. */
static void llmcbi_curl_note_idle(const llmcbi_transfer *t)
{
    llmcbi_curl *c = t->curl;
    curl_socket_t fd = CURL_SOCKET_BAD;
    size_t i;

    curl_easy_getinfo(t->easy, CURLINFO_ACTIVESOCKET, &fd);
    for (i = 0; i < c->n_idle && c->idle[i] != fd;)
        i++;
    if (fd != CURL_SOCKET_BAD && i == c->n_idle && i < LLMCBI_MAX_IDLE)
        c->idle[c->n_idle++] = fd;
}

/* What came behind a response would answer the next request: libcurl 7.88
 * does not look. */
static bool llmcbi_curl_has_surplus(const llmcbi_curl *c)
{
    size_t i;
    char byte;

    for (i = 0; i < c->n_idle; i++)
        if (LLMCBI_SYS(recv)(c->idle[i], &byte, 1, MSG_PEEK) >= 0) return true;
    return false;
}

/* What libcurl's code means here. */
static llmcb_code llmcbi_curl_code(const llmcbi_transfer *t, CURLcode code,
                                   long sys_errno)
{
    switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY: return LLMCB_EDNS;
    case CURLE_COULDNT_CONNECT:
        return llmcbi_errno_is_local((int)sys_errno) ? LLMCB_ESYS
                                                     : LLMCB_ECONNECT;
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CIPHER:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_ISSUER_ERROR:
    case CURLE_SSL_INVALIDCERTSTATUS:
    case CURLE_SSL_PINNEDPUBKEYNOTMATCH:
    case CURLE_SSL_ENGINE_NOTFOUND:
    case CURLE_SSL_ENGINE_SETFAILED:
    case CURLE_USE_SSL_FAILED: return LLMCB_ETLS;
    case CURLE_OPERATION_TIMEDOUT: return LLMCB_ETIMEDOUT;
    case CURLE_UNSUPPORTED_PROTOCOL: /* HTTP/0.9 */
    case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_BAD_CONTENT_ENCODING: return LLMCB_EPROTO;
    case CURLE_OUT_OF_MEMORY: { /* said of a header that is too long, too */
        curl_off_t began = 0;
        curl_easy_getinfo(t->easy, CURLINFO_STARTTRANSFER_TIME_T, &began);
        return t->in_body || !began ? LLMCB_ENOMEM : LLMCB_ELIMIT;
    }
    case CURLE_RECV_ERROR: /* said of bad chunks, too */
        return sys_errno == 0 && t->status && strstr(t->error, "hunk")
                   ? LLMCB_EPROTO
                   : LLMCB_EIO;
    default: return LLMCB_EIO;
    }
}

static void llmcbi_transfer_done(llmcbi_transfer *t, CURLcode result)
{
    llmcb_exchange *x = t->x;
    llmcb_ending ending = LLMCB_BROKEN;
    llmcb_code code = t->code;
    char text[200];
    long sys_errno = 0;

    curl_easy_getinfo(t->easy, CURLINFO_OS_ERRNO, &sys_errno);
    if (result == CURLE_COULDNT_CONNECT && t->open_errno)
        sys_errno = t->open_errno;
    llmcbi_curl_note_idle(t);
    if (code == LLMCB_OK && result == CURLE_OK)
        ending = LLMCB_ORDERLY;
    else if (code == LLMCB_OK && result == CURLE_PARTIAL_FILE)
        ending = LLMCB_CUT;
    else if (code == LLMCB_OK)
        code = llmcbi_curl_code(t, result, sys_errno);
    if (!t->message && result == CURLE_COULDNT_CONNECT && t->by_path)
        t->message = "could not connect to the socket"; /* no localhost */
    if (!t->message)
        t->message = *t->error ? t->error : curl_easy_strerror(result);
    llmcbi_copy_clean(text, sizeof text, t->message, strlen(t->message));
    llmcbi_transfer_free(t);
    if (x)
        llmcb_exchange_end(x, ending, code,
                           ending == LLMCB_BROKEN ? (int)sys_errno : 0, text);
}

/* In a turn of its own, for callbacks of libcurl's. */
static void llmcbi_transfer_fail(llmcbi_transfer *t, llmcb_code code)
{
    if (t->code == LLMCB_OK) {
        t->code = code;
        t->message = llmcb_code_text(code);
    }
    llmcbi_timer_start(t->curl->base.loop, &t->timer, 0);
}

static void llmcbi_curl_check(llmcbi_curl *c)
{
    CURLMsg *msg;
    int left;

    while ((msg = curl_multi_info_read(c->multi, &left)) != NULL) {
        char *t = NULL;
        CURLcode result = msg->data.result;
        if (msg->msg != CURLMSG_DONE) continue;
        curl_easy_getinfo(msg->easy_handle, CURLINFO_PRIVATE, &t);
        llmcbi_transfer_done((llmcbi_transfer *)(void *)t, result);
    }
}

static void llmcbi_curl_action(llmcbi_curl *c, curl_socket_t fd, int mask)
{
    llmcbi_sigpipe pipe_state;
    llmcbi_link *l;
    CURLMcode failed;
    int running;

    llmcbi_sigpipe_block(c, &pipe_state);
    failed = curl_multi_socket_action(c->multi, fd, mask, &running);
    llmcbi_sigpipe_restore(&pipe_state);
    /* out of memory: whose socket is watched no more, it does not tell */
    for (l = c->transfers; l && failed != CURLM_OK; l = l->next)
        llmcbi_transfer_fail(LLMCBI_OWNER(llmcbi_transfer, link, l),
                             LLMCB_ENOMEM);
    llmcbi_curl_check(c);
}

static void llmcbi_curl_timer(llmcbi_timer *t)
{
    llmcbi_curl_action(LLMCBI_OWNER(llmcbi_curl, timer, t), CURL_SOCKET_TIMEOUT,
                       0);
}

static void llmcbi_curl_event(llmcbi_watch *w, int events)
{
    llmcbi_curl_fd *f = LLMCBI_OWNER(llmcbi_curl_fd, watch, w);

    LLMCBI_FETCH(f->t);
    llmcbi_exchange_fetch(f->x, f->hot);
    llmcbi_curl_action(f->curl, w->fd,
                       (events & LLMCB_READ ? CURL_CSELECT_IN : 0) |
                           (events & LLMCB_WRITE ? CURL_CSELECT_OUT : 0));
}

/* A transfer whose descriptor cannot be watched fails, soon. To say so to
 * libcurl would end all others too, and none before a timer of its own. */
static int llmcbi_curl_unwatched(llmcbi_curl *c, CURL *easy, llmcb_code code)
{
    llmcbi_link *l;
    int saved = errno;

    for (l = c->transfers; l; l = l->next) {
        llmcbi_transfer *t = LLMCBI_OWNER(llmcbi_transfer, link, l);
        if (t->easy != easy) continue;
        t->watch_errno = code == LLMCB_ESYS ? saved : 0;
        llmcbi_transfer_fail(t, code);
    }
    return 0;
}

static void llmcbi_curl_fd_free(llmcbi_curl_fd *f)
{
    llmcb_loop *loop = f->curl->base.loop;

    llmcbi_watch_set(loop, &f->watch, 0);
    llmcbi_link_out(&f->link);
    llmcbi_free(&loop->alloc, f, sizeof *f);
}

static int llmcbi_curl_socket(CURL *easy, curl_socket_t fd, int what,
                              void *user, void *assigned)
{
    llmcbi_curl *c = (llmcbi_curl *)user;
    llmcbi_curl_fd *f = (llmcbi_curl_fd *)assigned;
    llmcb_loop *loop = c->base.loop;
    llmcb_code code;
    char *t = NULL;
    int events = (what & CURL_POLL_IN ? LLMCB_READ : 0) |
                 (what & CURL_POLL_OUT ? LLMCB_WRITE : 0);

    if (what == CURL_POLL_REMOVE) {
        if (f) llmcbi_curl_fd_free(f);
        return 0;
    }
    if (!f) {
        f = (llmcbi_curl_fd *)llmcbi_alloc(&loop->alloc, sizeof *f);
        if (!f) return llmcbi_curl_unwatched(c, easy, LLMCB_ENOMEM);
        f->watch.fn = llmcbi_curl_event;
        f->watch.fd = fd;
        f->curl = c;
        llmcbi_link_in(&c->fds, &f->link);
        curl_multi_assign(c->multi, fd, f);
    }
    curl_easy_getinfo(easy, CURLINFO_PRIVATE, &t);
    f->t = (const llmcbi_transfer *)(void *)t;
    if (f->t && f->t->x) {
        f->x = f->t->x;
        f->hot = (const char *)f->x->owner + f->x->sink->hot;
    }
    code = llmcbi_watch_set(loop, &f->watch, events);
    return code == LLMCB_OK ? 0 : llmcbi_curl_unwatched(c, easy, code);
}

static int llmcbi_curl_set_timer(CURLM *multi, long ms, void *user)
{
    llmcbi_curl *c = (llmcbi_curl *)user;

    (void)multi;
    if (ms < 0)
        llmcbi_timer_stop(c->base.loop, &c->timer);
    else
        llmcbi_timer_start(c->base.loop, &c->timer, ms);
    return 0;
}

/* A lingering transfer has had its time, or one cannot be watched. */
static void llmcbi_transfer_timer(llmcbi_timer *timer)
{
    llmcbi_transfer *t = LLMCBI_OWNER(llmcbi_transfer, timer, timer), gone = *t;

    llmcbi_transfer_free(t);
    if (gone.x)
        llmcb_exchange_end(gone.x, LLMCB_BROKEN, gone.code, gone.watch_errno,
                           gone.message);
}

static bool llmcbi_transfer_headers(llmcbi_transfer *t, const llmcb_request *q)
{
    const llmcb_allocator *a = &t->curl->base.loop->alloc;
    struct curl_slist *list = curl_slist_append(NULL, "Expect:");
    size_t i;

    t->headers = list;
    for (i = 0; list && i < q->n_headers; i++) {
        llmcbi_buf b;
        memset(&b, 0, sizeof b);
        llmcbi_buf_reserve(
            a, &b, strlen(q->headers[i].key) + strlen(q->headers[i].value) + 3);
        llmcbi_buf_text(a, &b, q->headers[i].key);
        /* how libcurl is told of one without a value */
        llmcbi_buf_text(a, &b, *q->headers[i].value ? ": " : ";");
        llmcbi_buf_text(a, &b, q->headers[i].value);
        list = b.failed ? NULL : curl_slist_append(t->headers, b.ptr);
        if (b.ptr) llmcbi_wipe(b.ptr, b.cap);
        llmcbi_buf_free(a, &b);
        if (list) t->headers = list;
    }
    return list != NULL;
}

/* All options, in one place: nothing is left to what the environment or a
 * configuration file may say, but a proxy for https, which sees no key. */
static bool llmcbi_transfer_options(llmcbi_transfer *t, const llmcb_request *q)
{
    CURL *e = t->easy;
    llmcbi_url u;
    bool ok = true;

#define LLMCBI_OPT(option, value) \
    ok = ok && curl_easy_setopt(e, option, value) == CURLE_OK
    if (llmcbi_url_parse(&u, q->url)) return false;
    if (u.tls) t->curl->tls = true;
    if (u.unix_path.len) {
        const llmcb_allocator *a = &t->curl->base.loop->alloc;
        llmcbi_buf b;
        memset(&b, 0, sizeof b);
        llmcbi_buf_add(a, &b, u.unix_path.ptr, u.unix_path.len);
        LLMCBI_OPT(CURLOPT_UNIX_SOCKET_PATH, b.ptr);
        t->by_path = true;
        b.len = 0;
        llmcbi_buf_text(a, &b, "http://localhost");
        llmcbi_buf_text(a, &b, u.target.ptr);
        ok = ok && !b.failed;
        LLMCBI_OPT(CURLOPT_URL, b.ptr);
        llmcbi_buf_free(a, &b);
    } else {
        LLMCBI_OPT(CURLOPT_URL, q->url);
    }
    if (!u.tls) LLMCBI_OPT(CURLOPT_PROXY, "");
    LLMCBI_OPT(CURLOPT_NOSIGNAL, 1L);
#if LIBCURL_VERSION_NUM >= 0x075500
    LLMCBI_OPT(CURLOPT_PROTOCOLS_STR, "http,https");
    LLMCBI_OPT(CURLOPT_REDIR_PROTOCOLS_STR, "http,https");
#else
    LLMCBI_OPT(CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    LLMCBI_OPT(CURLOPT_FOLLOWLOCATION, 0L);
    LLMCBI_OPT(CURLOPT_MAXREDIRS, 0L);
    LLMCBI_OPT(CURLOPT_NETRC, (long)CURL_NETRC_IGNORED);
    LLMCBI_OPT(CURLOPT_HTTP_VERSION, (long)(q->http2 ? CURL_HTTP_VERSION_2TLS
                                                     : CURL_HTTP_VERSION_1_1));
    LLMCBI_OPT(CURLOPT_HTTP09_ALLOWED, 0L);
    /* libcurl keeps this timer when it is connected, and sorts all that there
     * are for each read. Without it connecting ends after 300 s and is not
     * divided among addresses: on this machine the call's own limit will do. */
    if (u.tls || !llmcbi_url_is_local(&u) || (uint64_t)q->connect_ms >= 300000)
        LLMCBI_OPT(CURLOPT_CONNECTTIMEOUT_MS,
                   (long)(q->connect_ms > 0 && q->connect_ms < LONG_MAX
                              ? q->connect_ms
                              : LONG_MAX / 4));
#if LIBCURL_VERSION_NUM >= 0x074100
    LLMCBI_OPT(CURLOPT_MAXAGE_CONN, 30L);
#endif
#if LIBCURL_VERSION_NUM >= 0x075000
    LLMCBI_OPT(CURLOPT_MAXLIFETIME_CONN, 600L);
    LLMCBI_OPT(CURLOPT_PREREQFUNCTION, llmcbi_transfer_connected);
    LLMCBI_OPT(CURLOPT_PREREQDATA, t);
#else
    LLMCBI_OPT(CURLOPT_DEBUGFUNCTION, llmcbi_transfer_connected);
    LLMCBI_OPT(CURLOPT_DEBUGDATA, t);
    LLMCBI_OPT(CURLOPT_VERBOSE, 1L); /* to that function, and nowhere else */
#endif
    LLMCBI_OPT(CURLOPT_TCP_KEEPALIVE, 1L);
    LLMCBI_OPT(CURLOPT_OPENSOCKETFUNCTION, llmcbi_curl_open);
    LLMCBI_OPT(CURLOPT_OPENSOCKETDATA, t);
    LLMCBI_OPT(CURLOPT_CLOSESOCKETFUNCTION, llmcbi_curl_close);
    LLMCBI_OPT(CURLOPT_CLOSESOCKETDATA, t->curl);
    if (llmcbi_curl_has_surplus(t->curl)) LLMCBI_OPT(CURLOPT_FRESH_CONNECT, 1L);
    LLMCBI_OPT(CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
    LLMCBI_OPT(CURLOPT_SSL_VERIFYPEER, 1L);
    LLMCBI_OPT(CURLOPT_SSL_VERIFYHOST, 2L);
#ifdef LLMCB_ALLOW_INSECURE_TLS
    if (q->insecure_tls) {
        LLMCBI_OPT(CURLOPT_SSL_VERIFYPEER, 0L);
        LLMCBI_OPT(CURLOPT_SSL_VERIFYHOST, 0L);
    }
#endif
    if (q->ca_file) LLMCBI_OPT(CURLOPT_CAINFO, q->ca_file);
    LLMCBI_OPT(CURLOPT_POST, 1L);
    LLMCBI_OPT(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)q->body_len);
    LLMCBI_OPT(CURLOPT_POSTFIELDS, q->body);
    LLMCBI_OPT(CURLOPT_HTTPHEADER, t->headers);
    LLMCBI_OPT(CURLOPT_HEADERFUNCTION, llmcbi_transfer_header);
    LLMCBI_OPT(CURLOPT_HEADERDATA, t);
    LLMCBI_OPT(CURLOPT_WRITEFUNCTION, llmcbi_transfer_data);
    LLMCBI_OPT(CURLOPT_WRITEDATA, t);
    LLMCBI_OPT(CURLOPT_ERRORBUFFER, t->error);
    LLMCBI_OPT(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
    LLMCBI_OPT(CURLOPT_PRIVATE, t);
#undef LLMCBI_OPT
    return ok;
}

static llmcb_code llmcbi_curl_start(llmcb_transport *tr, llmcb_exchange *x,
                                    const llmcb_request *request)
{
    llmcbi_curl *c = (llmcbi_curl *)(void *)tr;
    llmcb_loop *loop = tr->loop;
    llmcbi_transfer *t =
        (llmcbi_transfer *)llmcbi_alloc(&loop->alloc, sizeof *t);

    if (!t) return LLMCB_ENOMEM;
    t->curl = c;
    t->x = x;
    t->limits = *request->limits;
    t->body_left = t->limits.body;
    t->request_len = request->body_len;
    llmcbi_link_in(&c->transfers, &t->link);
    if (llmcbi_timer_init(loop, &t->timer, llmcbi_transfer_timer) &&
        llmcbi_transfer_headers(t, request) &&
        (t->easy = curl_easy_init()) != NULL &&
        llmcbi_transfer_options(t, request) &&
        curl_multi_add_handle(c->multi, t->easy) == CURLM_OK) {
        *llmcbi_transfer_slot(x) = t;
        return LLMCB_OK;
    }
    llmcbi_transfer_free(t);
    return LLMCB_ENOMEM;
}

static void llmcbi_curl_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    llmcbi_transfer *t = *llmcbi_transfer_slot(x);
    llmcbi_sigpipe pipe_state;

    (void)tr;
    if (!t->held) return;
    t->held = false;
    llmcbi_sigpipe_block(t->curl, &pipe_state);
    if (curl_easy_pause(t->easy, CURLPAUSE_CONT) != CURLE_OK)
        llmcbi_transfer_fail(t, LLMCB_ENOMEM);
    llmcbi_sigpipe_restore(&pipe_state);
}

static void llmcbi_curl_cancel(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    llmcbi_transfer_free(*llmcbi_transfer_slot(x));
}

static void llmcbi_curl_release(llmcb_transport *tr, llmcb_exchange *x)
{
    llmcbi_transfer *t = *llmcbi_transfer_slot(x);
    curl_off_t sent = 0;

    /* libcurl still reads the request, which is about to go */
    curl_easy_getinfo(t->easy, CURLINFO_SIZE_UPLOAD_T, &sent);
    if (t->held || (uint64_t)sent < t->request_len) {
        llmcbi_transfer_free(t);
        return;
    }
    t->x = NULL;
    llmcbi_timer_start(tr->loop, &t->timer, LLMCBI_LINGER_MS);
}

static void llmcbi_curl_free(llmcb_transport *tr)
{
    llmcbi_curl *c = (llmcbi_curl *)(void *)tr;
    llmcb_loop *loop = tr->loop;
    llmcbi_sigpipe pipe_state;

    while (c->transfers)
        llmcbi_transfer_free(LLMCBI_OWNER(llmcbi_transfer, link, c->transfers));
    llmcbi_sigpipe_block(c, &pipe_state);
    curl_multi_cleanup(c->multi); /* takes leave of kept connections */
    llmcbi_sigpipe_restore(&pipe_state);
    while (c->fds)
        llmcbi_curl_fd_free(LLMCBI_OWNER(llmcbi_curl_fd, link, c->fds));
    llmcbi_timer_free(loop, &c->timer);
    llmcbi_free(&loop->alloc, c, sizeof *c);
}

LLMCBI_DEF llmcb_transport *llmcb_curl_transport(llmcb_loop *loop)
{
    llmcbi_curl *c;
    bool ok;

    if (llmcbi_enter(loop) != LLMCB_OK) return NULL;
    /* counted by libcurl and never undone; before libcurl 7.84 a program
     * with several threads calls it first, as libcurl documents */
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) return NULL;
    c = (llmcbi_curl *)llmcbi_alloc(&loop->alloc, sizeof *c);
    if (!c) return NULL;
    c->base.state_size = sizeof(llmcbi_transfer *);
    c->base.start = llmcbi_curl_start;
    c->base.resume = llmcbi_curl_resume;
    c->base.release = llmcbi_curl_release;
    c->base.cancel = llmcbi_curl_cancel;
    c->base.free = llmcbi_curl_free;
    c->base.loop = loop;
    c->multi = curl_multi_init();
    ok = c->multi && llmcbi_timer_init(loop, &c->timer, llmcbi_curl_timer);
#define LLMCBI_OPT(option, value) \
    ok = ok && curl_multi_setopt(c->multi, option, value) == CURLM_OK
    LLMCBI_OPT(CURLMOPT_SOCKETFUNCTION, llmcbi_curl_socket);
    LLMCBI_OPT(CURLMOPT_SOCKETDATA, c);
    LLMCBI_OPT(CURLMOPT_TIMERFUNCTION, llmcbi_curl_set_timer);
    LLMCBI_OPT(CURLMOPT_TIMERDATA, c);
    LLMCBI_OPT(CURLMOPT_MAXCONNECTS, (long)LLMCBI_MAX_IDLE);
#undef LLMCBI_OPT
    if (!ok) {
        llmcbi_curl_free(&c->base);
        return NULL;
    }
    llmcb_transport_init(loop, &c->base);
    return &c->base;
}
#endif /* LLMCB_NO_CURL */

/* With a descriptor of it in the child, a connection would not end with the
 * parent's. Nothing but close: a poller and TLS states are shared. */
static void llmcbi_transports_forked(llmcb_loop *loop)
{
    llmcb_transport *tr;

    for (tr = loop->transports; tr; tr = tr->next) {
#ifndef LLMCB_NO_SOCKETS
        if (tr->free == llmcbi_sock_free) {
            llmcbi_conns_forked(((llmcbi_sock *)(void *)tr)->conns);
            llmcbi_conns_forked(((llmcbi_sock *)(void *)tr)->idle);
        }
#endif
#ifndef LLMCB_NO_CURL
        if (tr->free == llmcbi_curl_free) {
            llmcbi_curl *c = (llmcbi_curl *)(void *)tr;
            llmcbi_link *l;
            size_t i;
            for (l = c->fds; l; l = l->next) {
                llmcbi_curl_fd *f = LLMCBI_OWNER(llmcbi_curl_fd, link, l);
                LLMCBI_SYS(close)(f->watch.fd);
            }
            for (i = 0; i < c->n_idle; i++)
                LLMCBI_SYS(close)(c->idle[i]);
        }
#endif
    }
}

/* ==== [REPLAY] recordings: play them, make them ======================== */

#ifndef LLMCB_NO_KIT
static llmcb_code llmcbi_no_start(llmcb_transport *tr, llmcb_exchange *x,
                                  const llmcb_request *request)
{
    (void)tr;
    (void)x;
    (void)request;
    return LLMCB_ENOMEM;
}

/* Instead of a transport that there was no memory for: with NULL a chat would
 * go to the network. */
static llmcb_transport *llmcbi_no_transport(llmcb_loop *loop)
{
    loop->none.loop = loop;
    loop->none.start = llmcbi_no_start;
    return &loop->none;
}

/* One response to play, owned by the transport. */
typedef struct llmcbi_tape {
    llmcbi_buf bytes;
    llmcbi_buf borders; /* of llmcb_segment */
    llmcb_replay_end end;
} llmcbi_tape;

typedef struct llmcbi_replay {
    llmcb_transport base;
    llmcbi_buf tapes; /* of llmcbi_tape */
    size_t n_tapes, turn;
    char missing[96]; /* what could not be read */
    int sys_errno;    /* why */
    bool no_delays;
    bool failed; /* no memory */
} llmcbi_replay;

/* A response being played. */
typedef struct llmcbi_player {
    llmcb_exchange *x;
    const llmcbi_replay *replay;
    const llmcbi_tape *tape; /* NULL: there is nothing to play */
    llmcbi_ready ready;
    llmcbi_timer timer;
    llmcbi_h1 h1;
    size_t segment;
    bool connected;
    bool open; /* the timer must be freed */
} llmcbi_player;

static llmcbi_player *llmcbi_player_of(llmcb_exchange *x)
{
    return (llmcbi_player *)llmcb_exchange_state(x);
}

static void llmcbi_player_close(llmcbi_player *p)
{
    llmcb_loop *loop = p->x->tr->loop;

    if (!p->open) return;
    p->open = false;
    llmcbi_unready(&p->ready);
    llmcbi_timer_free(loop, &p->timer);
    llmcbi_h1_free(&loop->alloc, &p->h1);
}

static void llmcbi_player_end(llmcbi_player *p, llmcb_ending ending,
                              llmcb_code code, int sys_errno,
                              const char *message)
{
    llmcbi_player_close(p);
    llmcb_exchange_end(p->x, ending, code, sys_errno, message);
}

static void llmcbi_player_answered(llmcbi_player *p, llmcb_ending ending)
{
    const llmcbi_h1_reason *why = llmcbi_h1_why(&p->h1);

    llmcbi_player_end(p, ending, why->code, 0, why->message);
}

static llmcb_segment *llmcbi_tape_segments(const llmcbi_tape *t, size_t *n)
{
    *n = t->borders.len / sizeof(llmcb_segment);
    return (llmcb_segment *)(void *)t->borders.ptr;
}

LLMCBI_APART static const char *llmcbi_tape_at(const llmcbi_tape *t,
                                               size_t segment)
{
    size_t n, at = t->bytes.len;
    const llmcb_segment *s = llmcbi_tape_segments(t, &n);

    if (segment == 0)
        at = 0;
    else if (segment < n && s[segment].offset < at)
        at = s[segment].offset;
    return t->bytes.ptr + at;
}

/* What follows the last byte. */
static void llmcbi_player_over(llmcbi_player *p)
{
    switch (p->tape->end) {
    case LLMCB_REPLAY_RESET:
        llmcbi_player_end(p, LLMCB_BROKEN, LLMCB_EIO, ECONNRESET, NULL);
        return;
    case LLMCB_REPLAY_CLOSE:
        llmcbi_player_answered(p, llmcbi_h1_eof(&p->h1));
        return;
    case LLMCB_REPLAY_REFUSE:
    case LLMCB_REPLAY_KEEP:
    default: return; /* silence */
    }
}

/* Waits for the delay of the next segment, or does without. */
static void llmcbi_player_next(llmcbi_player *p)
{
    size_t n;
    const llmcb_segment *s = llmcbi_tape_segments(p->tape, &n);
    int64_t ms = 0;

    if (p->segment < n && !p->replay->no_delays) ms = s[p->segment].delay_ms;
    if (ms > 0)
        llmcbi_timer_start(p->x->tr->loop, &p->timer, ms);
    else
        llmcbi_make_ready(p->x->tr->loop, &p->ready);
}

static void llmcbi_player_play(llmcbi_ready *r)
{
    llmcbi_player *p = LLMCBI_OWNER(llmcbi_player, ready, r);
    const llmcbi_tape *t = p->tape;
    const char *at, *end;
    llmcbi_h1_type type;
    size_t n;

    if (!t) {
        llmcbi_player_end(p, LLMCB_BROKEN, LLMCB_ESYS, p->replay->sys_errno,
                          p->replay->missing);
        return;
    }
    if (!p->connected) {
        p->connected = true;
        if (t->end == LLMCB_REPLAY_REFUSE) {
            llmcbi_player_end(p, LLMCB_BROKEN, LLMCB_ECONNECT, ECONNREFUSED,
                              NULL);
            return;
        }
        llmcb_exchange_connected(p->x);
        llmcbi_player_next(p);
        return;
    }
    if (p->x->paused) return;
    llmcbi_tape_segments(t, &n);
    if (p->segment && p->segment >= n) {
        llmcbi_player_over(p);
        return;
    }
    at = llmcbi_tape_at(t, p->segment);
    end = llmcbi_tape_at(t, ++p->segment);
    type = llmcbi_h1_drive(p->x->tr->loop, &p->h1, p->x, &at, end);
    if (type == LLMCBI_H1_END)
        llmcbi_player_end(p, LLMCB_ORDERLY, LLMCB_OK, 0, NULL);
    else if (type == LLMCBI_H1_ERROR)
        llmcbi_player_answered(p, LLMCB_BROKEN);
    else
        llmcbi_player_next(p);
}

static void llmcbi_player_timer(llmcbi_timer *timer)
{
    llmcbi_player *p = LLMCBI_OWNER(llmcbi_player, timer, timer);

    llmcbi_make_ready(p->x->tr->loop, &p->ready);
}

static llmcb_code llmcbi_replay_start(llmcb_transport *tr, llmcb_exchange *x,
                                      const llmcb_request *request)
{
    llmcbi_replay *r = (llmcbi_replay *)(void *)tr;
    llmcbi_player *p = llmcbi_player_of(x);

    p->x = x;
    p->replay = r;
    if (r->n_tapes) p->tape = (llmcbi_tape *)(void *)r->tapes.ptr + r->turn;
    p->ready.fn = llmcbi_player_play;
    llmcbi_h1_init(&p->h1, request->limits);
    if (!llmcbi_timer_init(tr->loop, &p->timer, llmcbi_player_timer))
        return LLMCB_ENOMEM;
    p->open = true;
    if (r->turn + 1 < r->n_tapes) r->turn++;
    llmcbi_make_ready(tr->loop, &p->ready);
    return LLMCB_OK;
}

static void llmcbi_replay_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    llmcbi_player *p = llmcbi_player_of(x);

    (void)tr;
    if (!p->timer.place) llmcbi_make_ready(x->tr->loop, &p->ready);
}

static void llmcbi_replay_stop(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    llmcbi_player_close(llmcbi_player_of(x));
}

static void llmcbi_replay_free(llmcb_transport *tr)
{
    llmcbi_replay *r = (llmcbi_replay *)(void *)tr;
    const llmcb_allocator *a = &tr->loop->alloc;
    llmcbi_tape *t = (llmcbi_tape *)(void *)r->tapes.ptr;

    for (; r->n_tapes; r->n_tapes--, t++) {
        llmcbi_buf_free(a, &t->bytes);
        llmcbi_buf_free(a, &t->borders);
    }
    llmcbi_buf_free(a, &r->tapes);
    llmcbi_free(a, r, sizeof *r);
}

/* Takes over what is in t. A border that lies before another is moved to it:
 * nothing comes twice. */
static void llmcbi_tape_add(llmcbi_replay *r, llmcbi_tape *t)
{
    const llmcb_allocator *a = &r->base.loop->alloc;
    size_t i, n;
    llmcb_segment *s = llmcbi_tape_segments(t, &n);

    for (i = 1; i < n; i++)
        if (s[i].offset < s[i - 1].offset) s[i].offset = s[i - 1].offset;
    llmcbi_buf_add(a, &r->tapes, (const char *)t, sizeof *t);
    if (r->tapes.failed || t->bytes.failed || t->borders.failed)
        r->failed = true;
    if (!r->tapes.failed) {
        r->n_tapes++;
        return;
    }
    llmcbi_buf_free(a, &t->bytes);
    llmcbi_buf_free(a, &t->borders);
}

static void llmcbi_tape_copy(llmcbi_replay *r, const llmcb_recording *rec)
{
    const llmcb_allocator *a = &r->base.loop->alloc;
    llmcbi_tape t;

    memset(&t, 0, sizeof t);
    t.end = rec->end;
    llmcbi_buf_add(a, &t.bytes, rec->bytes, rec->len);
    llmcbi_buf_add(a, &t.borders, (const char *)rec->segments,
                   rec->n_segments * sizeof *rec->segments);
    llmcbi_tape_add(r, &t);
}

/* NAME.http, NAME-2.http ..., NAME.segments.json ...: stem, number, ending */
static void llmcbi_tape_name(const llmcb_allocator *a, llmcbi_buf *b,
                             const char *path, size_t number,
                             const char *ending)
{
    size_t len = strlen(path);

    if (len > 5 && strcmp(path + len - 5, ".http") == 0) len -= 5;
    memset(b, 0, sizeof *b);
    llmcbi_buf_add(a, b, path, len);
    if (number > 1) llmcbi_buf_print(a, b, "-%d", (int64_t)number);
    llmcbi_buf_text(a, b, ending);
}

#ifndef LLMCB_NO_STDIO
#define LLMCBI_APPEND (O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW)

/* A regular file, or -1: opening a FIFO would wait for its other end. */
static int llmcbi_open_file(const char *path, int flags)
{
    int fd =
        LLMCBI_SYS(open)(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600);
    struct stat st;

    if (fd >= 0 && (LLMCBI_SYS(fstat)(fd, &st) != 0 || !S_ISREG(st.st_mode))) {
        LLMCBI_SYS(close)(fd);
        errno = EINVAL;
        fd = -1;
    }
    /* one that is written anew may have been open to others */
    if (fd >= 0 && (flags & O_TRUNC)) (void)fchmod(fd, 0600);
    return fd;
}

static bool llmcbi_read_file(const llmcb_allocator *a, llmcbi_buf *b,
                             const char *path)
{
    int fd = llmcbi_open_file(path, O_RDONLY);
    ssize_t n = -1;

    if (fd < 0) return false;
    while (llmcbi_buf_reserve(a, b, 16384)) {
        n = LLMCBI_SYS(read)(fd, b->ptr + b->len, 16384);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        b->len += (size_t)n;
    }
    LLMCBI_SYS(close)(fd);
    return n == 0 && !b->failed;
}

/* [[offset, delay], ...] */
static bool llmcbi_tape_read_segments(const llmcb_allocator *a,
                                      llmcbi_buf *borders, llmcbi_json *j)
{
    llmcb_segment s;
    int64_t v[2];
    int i;

    if (llmcbi_json_next(j) != LLMCBI_JSON_ARRAY) return false;
    while (llmcbi_json_next(j) == LLMCBI_JSON_ARRAY) {
        for (i = 0; i < 2; i++)
            if (llmcbi_json_next(j) != LLMCBI_JSON_NUMBER ||
                !llmcbi_json_int(j, &v[i]) || v[i] < 0)
                return false;
        if (llmcbi_json_next(j) != LLMCBI_JSON_ARRAY_END) return false;
        s.offset = (size_t)v[0];
        s.delay_ms = v[1];
        llmcbi_buf_add(a, borders, (const char *)&s, sizeof s);
    }
    return borders->len > 0;
}

LLMCBI_APART static bool llmcbi_tape_borders(const llmcb_allocator *a,
                                             llmcbi_tape *t, llmcb_str text)
{
    llmcbi_json j;
    llmcbi_json_type type;

    llmcbi_json_init(&j, text.ptr, text.len);
    if (llmcbi_json_next(&j) != LLMCBI_JSON_OBJECT) return false;
    while ((type = llmcbi_json_next(&j)) == LLMCBI_JSON_KEY) {
        if (llmcbi_json_is(&j, "end")) {
            if (llmcbi_json_next(&j) != LLMCBI_JSON_STRING) return false;
            t->end = llmcbi_json_is(&j, "rst")      ? LLMCB_REPLAY_RESET
                     : llmcbi_json_is(&j, "close")  ? LLMCB_REPLAY_CLOSE
                     : llmcbi_json_is(&j, "refuse") ? LLMCB_REPLAY_REFUSE
                                                    : LLMCB_REPLAY_KEEP;
        } else if (llmcbi_json_is(&j, "segments")) {
            if (t->borders.len) return false;
            if (!llmcbi_tape_read_segments(a, &t->borders, &j)) {
                t->borders.len = 0;
                return false;
            }
        } else {
            llmcbi_json_skip(&j, llmcbi_json_next(&j));
        }
    }
    return type == LLMCBI_JSON_OBJECT_END;
}

static bool llmcbi_tape_read(llmcbi_replay *r, llmcbi_buf *b, const char *path,
                             size_t number, const char *ending)
{
    const llmcb_allocator *a = &r->base.loop->alloc;
    llmcbi_buf name;
    bool ok;

    memset(b, 0, sizeof *b);
    llmcbi_tape_name(a, &name, path, number, ending);
    ok = !name.failed && llmcbi_read_file(a, b, name.ptr);
    if (name.failed || b->failed) r->failed = true;
    llmcbi_buf_free(a, &name);
    if (!ok) llmcbi_buf_free(a, b);
    return ok;
}

/* false: there is no such file, or it is not a recording. */
static bool llmcbi_tape_load(llmcbi_replay *r, const char *path, size_t number)
{
    const llmcb_allocator *a = &r->base.loop->alloc;
    llmcbi_buf text;
    llmcbi_tape t;
    bool ok = true;

    memset(&t, 0, sizeof t);
    t.end = LLMCB_REPLAY_CLOSE;
    if (!llmcbi_tape_read(r, &t.bytes, path, number, ".http")) {
        if (number == 1) r->sys_errno = errno;
        return false;
    }
    if (llmcbi_tape_read(r, &text, path, number, ".segments.json"))
        ok = llmcbi_tape_borders(a, &t, llmcbi_buf_str(&text));
    if (!ok)
        llmcbi_log(r->base.loop, "the .segments.json of a recording is not "
                                 "what it should be, and is not used");
    llmcbi_buf_free(a, &text);
    llmcbi_tape_add(r, &t);
    return !r->failed;
}
#else
static bool llmcbi_tape_load(llmcbi_replay *r, const char *path, size_t number)
{
    (void)r;
    (void)path;
    (void)number;
    return false;
}
#endif

LLMCBI_DEF llmcb_transport *llmcb_replay_new(llmcb_loop *loop,
                                             const llmcb_replay_desc *desc)
{
    static const llmcb_transport base = { sizeof(llmcbi_player),
                                          llmcbi_replay_start,
                                          llmcbi_replay_resume,
                                          llmcbi_replay_stop,
                                          llmcbi_replay_stop,
                                          llmcbi_replay_free,
                                          NULL,
                                          NULL };
    static const char why[] = "no recording can be read from ";
    llmcbi_replay *r;
    size_t i;

    if (llmcbi_enter(loop) != LLMCB_OK || !desc) return NULL;
    r = (llmcbi_replay *)llmcbi_alloc(&loop->alloc, sizeof *r);
    if (!r) return llmcbi_no_transport(loop);
    r->base = base;
    r->base.loop = loop;
    r->no_delays = desc->no_delays;
    for (i = 0; i < desc->n_recordings; i++)
        llmcbi_tape_copy(r, &desc->recordings[i]);
    if (desc->path && !desc->n_recordings)
        for (i = 1; llmcbi_tape_load(r, desc->path, i);)
            i++;
    if (r->failed) {
        llmcbi_replay_free(&r->base);
        return llmcbi_no_transport(loop);
    }
    memcpy(r->missing, why, sizeof why);
    if (desc->path)
        llmcbi_copy_clean(r->missing + sizeof why - 1,
                          sizeof r->missing - sizeof why + 1, desc->path,
                          strlen(desc->path));
    llmcb_transport_init(loop, &r->base);
    return &r->base;
}

/* -- the recorder */

typedef struct llmcbi_recorder {
    llmcb_transport base;
    llmcb_transport *inner;
    const char *path; /* stands behind it */
    size_t number;    /* of the last response */
} llmcbi_recorder;

/* A response being recorded: what comes from the inner exchange is noted
 * and handed on to the outer one. */
typedef struct llmcbi_take {
    llmcbi_recorder *recorder;
    llmcb_exchange *outer, *inner;
    llmcbi_buf http, borders;
    size_t number;
    int64_t last;
    bool in_body;
} llmcbi_take;

static void llmcbi_take_border(llmcbi_take *t)
{
    const llmcb_allocator *a = &t->outer->tr->loop->alloc;
    int64_t now = t->outer->tr->loop->now;

    llmcbi_buf_print(a, &t->borders, "%s[%d,%d]", t->borders.len ? "," : "",
                     (int64_t)t->http.len, now - t->last);
    t->last = now;
}

static void llmcbi_take_connected(void *owner)
{
    llmcb_exchange_connected(((llmcbi_take *)owner)->outer);
}

static void llmcbi_take_again(void *owner)
{
    llmcbi_exchange_again(((llmcbi_take *)owner)->outer);
}

static void llmcbi_take_sent(void *owner)
{
    llmcb_exchange_sent(((llmcbi_take *)owner)->outer);
}

static void llmcbi_take_status(void *owner, int status)
{
    llmcbi_take *t = (llmcbi_take *)owner;
    const llmcb_allocator *a = &t->outer->tr->loop->alloc;

    llmcbi_take_border(t);
    llmcbi_buf_print(a, &t->http, "HTTP/1.1 %d \r\n", (int64_t)status);
    llmcb_exchange_status(t->outer, status);
}

static void llmcbi_take_header(void *owner, llmcb_str name, llmcb_str value)
{
    static const char left_out[] =
        "transfer-encoding content-length connection set-cookie "
        "authorization openai-organization openai-project";
    llmcbi_take *t = (llmcbi_take *)owner;
    const llmcb_allocator *a = &t->outer->tr->loop->alloc;

    if (!llmcbi_str_listed(name, left_out))
        llmcbi_buf_print(a, &t->http, "%S: %S\r\n", &name, &value);
    llmcb_exchange_header(t->outer, name, value);
}

static void llmcbi_take_head_end(llmcbi_take *t)
{
    if (t->in_body) return;
    t->in_body = true;
    llmcbi_buf_text(&t->outer->tr->loop->alloc, &t->http,
                    "Transfer-Encoding: chunked\r\n\r\n");
}

/* A piece of the body becomes one chunk and one border. */
static void llmcbi_take_data(void *owner, llmcb_str *pieces, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    llmcbi_take *t = (llmcbi_take *)owner;
    char digits[2 * sizeof(size_t) + 1];

    if (!n) llmcbi_exchange_wait(t->outer);
    for (; n; n--, pieces++) {
        char *size = digits + sizeof digits - 1;
        size_t left = pieces->len;
        *size = '\0';
        do
            *--size = hex[left & 15];
        while ((left >>= 4) != 0);
        llmcbi_take_head_end(t);
        llmcbi_take_border(t);
        llmcbi_buf_print(&t->outer->tr->loop->alloc, &t->http, "%s\r\n%S\r\n",
                         size, pieces);
        if (!llmcb_exchange_data(t->outer, pieces->ptr, pieces->len))
            t->inner->paused = true;
        pieces->len = 0;
    }
}

#ifndef LLMCB_NO_STDIO
static bool llmcbi_write_file(const char *path, llmcb_str text)
{
    int fd = llmcbi_open_file(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW);
    size_t at = 0;

    if (fd < 0) return false;
    while (at < text.len) {
        ssize_t n = LLMCBI_SYS(write)(fd, text.ptr + at, text.len - at);
        if (n < 0 && errno != EINTR) break;
        if (n > 0) at += (size_t)n;
    }
    return LLMCBI_SYS(close)(fd) == 0 && at == text.len;
}
#else
static bool llmcbi_write_file(const char *path, llmcb_str text)
{
    (void)path;
    (void)text;
    errno = ENOSYS;
    return false;
}
#endif

static bool llmcbi_take_write(const llmcbi_take *t, const char *ending,
                              const llmcbi_buf *content)
{
    const llmcb_allocator *a = &t->outer->tr->loop->alloc;
    llmcbi_buf name;
    bool ok;

    llmcbi_tape_name(a, &name, t->recorder->path, t->number, ending);
    ok = !name.failed && llmcbi_write_file(name.ptr, llmcbi_buf_str(content));
    llmcbi_buf_free(a, &name);
    return ok;
}

/* Says so, with room for it in a buffer that is needed no more. */
static void llmcbi_take_lost(const llmcbi_take *t, llmcbi_buf *line)
{
    llmcb_loop *loop = t->outer->tr->loop;
    int64_t why = errno;

    line->len = 0;
    llmcbi_buf_print(&loop->alloc, line,
                     "a recording could not be written: %s, errno %d",
                     t->recorder->path, why);
    llmcbi_log(loop,
               line->failed ? "a recording could not be written" : line->ptr);
}

static void llmcbi_take_save(llmcbi_take *t, const char *end)
{
    llmcb_loop *loop = t->outer->tr->loop;
    llmcbi_buf json;

    memset(&json, 0, sizeof json);
    errno = ENOMEM; /* unless a system call says otherwise */
    llmcbi_buf_print(&loop->alloc, &json,
                     "{\"end\":\"%s\",\"segments\":[%s]}\n", end,
                     t->borders.len ? t->borders.ptr : "[0,0]");
    if (t->http.failed || t->borders.failed || json.failed ||
        !llmcbi_take_write(t, ".http", &t->http) ||
        !llmcbi_take_write(t, ".segments.json", &json))
        llmcbi_take_lost(t, &json);
    llmcbi_buf_free(&loop->alloc, &json);
}

/* The take is over, one way or the other. */
static void llmcbi_take_close(llmcbi_take *t, const char *end)
{
    const llmcb_allocator *a = &t->outer->tr->loop->alloc;

    llmcbi_take_save(t, end);
    llmcbi_buf_free(a, &t->http);
    llmcbi_buf_free(a, &t->borders);
}

static void llmcbi_take_end(void *owner, llmcb_ending ending,
                            const llmcb_error *error)
{
    llmcbi_take *t = (llmcbi_take *)owner;
    llmcb_error e = *error;

    if (ending == LLMCB_ORDERLY) {
        llmcbi_take_head_end(t);
        llmcbi_take_border(t);
        llmcbi_buf_text(&t->outer->tr->loop->alloc, &t->http, "0\r\n\r\n");
    }
    llmcbi_take_close(t, e.code == LLMCB_ECONNECT  ? "refuse"
                         : ending == LLMCB_ORDERLY ? "keep"
                         : ending == LLMCB_CUT     ? "close"
                                                   : "rst");
    llmcbi_exchange_close(t->inner, LLMCBI_PART_UNSTARTED);
    llmcb_exchange_end(t->outer, ending, e.code, e.sys_errno, e.message);
}

/* Behind a take is the exchange that it listens to. */
#define LLMCBI_TAKE_HEAD LLMCBI_ALIGN(sizeof(llmcbi_take))

static llmcb_code llmcbi_record_start(llmcb_transport *tr, llmcb_exchange *x,
                                      const llmcb_request *request)
{
    static const llmcbi_sink sink = { llmcbi_take_connected, llmcbi_take_sent,
                                      llmcbi_take_status,    llmcbi_take_header,
                                      llmcbi_take_data,      llmcbi_take_end,
                                      llmcbi_take_again,     0 };
    llmcbi_recorder *r = (llmcbi_recorder *)(void *)tr;
    llmcbi_take *t = (llmcbi_take *)llmcb_exchange_state(x);
    llmcb_code code;

    t->recorder = r;
    t->outer = x;
    t->last = tr->loop->now;
    t->inner = (llmcb_exchange *)(void *)((char *)t + LLMCBI_TAKE_HEAD);
    llmcbi_exchange_open(t->inner, r->inner, &sink, t);
    code = r->inner->start(r->inner, t->inner, request);
    if (code == LLMCB_OK)
        t->number = ++r->number;
    else
        llmcbi_exchange_close(t->inner, LLMCBI_PART_UNSTARTED);
    return code;
}

static void llmcbi_record_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    llmcbi_take *t = (llmcbi_take *)llmcb_exchange_state(x);

    (void)tr;
    llmcbi_exchange_resume(t->inner);
}

static void llmcbi_record_part(llmcb_exchange *x, llmcbi_parting how)
{
    llmcbi_take *t = (llmcbi_take *)llmcb_exchange_state(x);

    /* what was left unread: the answer was complete, or nobody knows */
    llmcbi_take_close(t, "close");
    llmcbi_exchange_close(t->inner, how);
}

static void llmcbi_record_release(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    llmcbi_record_part(x, LLMCBI_PART_RELEASE);
}

static void llmcbi_record_cancel(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    llmcbi_record_part(x, LLMCBI_PART_CANCEL);
}

static void llmcbi_record_free(llmcb_transport *tr)
{
    llmcbi_recorder *r = (llmcbi_recorder *)(void *)tr;

    llmcbi_free(&tr->loop->alloc, r, sizeof *r + strlen(r->path) + 1);
}

LLMCBI_DEF llmcb_transport *
llmcb_record_new(llmcb_loop *loop, llmcb_transport *inner, const char *path)
{
    static const llmcb_transport base = { 0,
                                          llmcbi_record_start,
                                          llmcbi_record_resume,
                                          llmcbi_record_release,
                                          llmcbi_record_cancel,
                                          llmcbi_record_free,
                                          NULL,
                                          NULL };
    llmcbi_recorder *r;

    if (llmcbi_enter(loop) != LLMCB_OK || !inner || inner->loop != loop ||
        !path)
        return NULL;
    r = (llmcbi_recorder *)llmcbi_alloc(&loop->alloc,
                                        sizeof *r + strlen(path) + 1);
    if (!r) return llmcbi_no_transport(loop);
    r->base = base;
    r->base.state_size = LLMCBI_TAKE_HEAD + llmcbi_exchange_size(inner);
    r->inner = inner;
    r->path = strcpy((char *)(r + 1), path);
    llmcb_transport_init(loop, &r->base);
    return &r->base;
}
#endif /* LLMCB_NO_KIT */

/* ==== [WIRE] the OpenAI dialect: request body, answer ================== */

/* A value of the answer as it stands in the JSON text: a string without its
 * quotes. */
typedef struct llmcbi_raw {
    const char *ptr; /* NULL: absent or null */
    size_t len;
    bool plain;  /* ASCII without escapes */
    bool object; /* not a string */
} llmcbi_raw;

/* One element of "choices". */
typedef struct llmcbi_wire_choice {
    int64_t index;
    bool has_delta; /* or a message */
    llmcbi_raw text, refusal, reasoning, finish_reason;
    llmcbi_raw tool_calls;    /* JSON array */
    llmcbi_raw function_call; /* JSON object, the old form */
    llmcbi_raw logprobs;      /* JSON object */
} llmcbi_wire_choice;

/* One event of a stream, or a whole answer. The first choice is read with
 * it; `rest` stands behind it if there are more. */
typedef struct llmcbi_wire_event {
    bool has_choice, more;
    llmcbi_wire_choice choice;
    llmcbi_json rest;
    llmcb_usage usage;
    llmcbi_raw model, id, fingerprint;
    llmcbi_raw error; /* its JSON text; len 0: none */
} llmcbi_wire_event;

/* A member that is wanted of an object. */
typedef struct llmcbi_wanted {
    uint8_t level;  /* 0: of the object, others: of an object in it */
    uint8_t opens;  /* the level of its own members, if they are wanted */
    uint16_t types; /* of its value, as bits; 0: the caller reads it */
    uint16_t at;    /* where it goes: a number to an int64_t, others to a
                       llmcbi_raw; that it opened a level to a bool */
    uint8_t len;
    char name[26]; /* "": the end of the list */
} llmcbi_wanted;

#define LLMCBI_WANTED(level, opens, types, at, name)                \
    {                                                               \
        level, opens, types, (uint16_t)(at), sizeof(name) - 1, name \
    }
#define LLMCBI_A_NUMBER (1u << LLMCBI_JSON_NUMBER)
#define LLMCBI_A_STRING (1u << LLMCBI_JSON_STRING)
#define LLMCBI_AN_OBJECT (1u << LLMCBI_JSON_OBJECT)
#define LLMCBI_AN_ARRAY (1u << LLMCBI_JSON_ARRAY)
/* A value of another type changes nothing; a number is -1 then, not 0. */
#define LLMCBI_OR_NONE (1u << LLMCBI_JSON_END)
/* Neither does an empty string. */
#define LLMCBI_OR_EMPTY (1u << LLMCBI_JSON_KEY)

/* Keeps the value that j has just passed and that begins at `start`. */
static void llmcbi_wire_keep(const llmcbi_json *j, llmcbi_json_type type,
                             const char *start, unsigned types, void *to)
{
    const int64_t most = INT64_MAX >> 20; /* so that no sum overflows */
    llmcbi_raw *raw = (llmcbi_raw *)to;
    bool fits = (types >> type & 1) != 0;
    int64_t v;

    if ((types & ~LLMCBI_OR_NONE) == LLMCBI_A_NUMBER) {
        if (!fits || !llmcbi_json_int(j, &v) || v < 0)
            v = types & LLMCBI_OR_NONE ? -1 : 0;
        *(int64_t *)to = v < most ? v : most;
    } else if (fits && type <= LLMCBI_JSON_ARRAY) {
        raw->ptr = start;
        raw->len = (size_t)(j->p - start);
        raw->plain = false;
        raw->object = true;
    } else if (fits ? j->len || !(types & LLMCBI_OR_EMPTY)
                    : !(types & LLMCBI_OR_NONE)) {
        raw->ptr = fits ? j->str : NULL;
        raw->len = fits ? j->len : 0;
        raw->plain = !j->escaped && !j->high;
        raw->object = false;
    }
}

/* Reads the wanted members of an object, whose brace has been read, into
 * `out`. true: it stands in front of a value that the caller reads before it
 * calls again. */
static bool llmcbi_wire_object(llmcbi_json *j, const llmcbi_wanted *all,
                               unsigned level, void *out)
{
    llmcbi_json_type type;

    while ((type = llmcbi_json_next(j)) == LLMCBI_JSON_KEY ||
           (type == LLMCBI_JSON_OBJECT_END && level)) {
        const llmcbi_wanted *m = all;
        const char *start;
        char *to;
        if (type == LLMCBI_JSON_OBJECT_END) {
            while (m->opens != level)
                m++;
            level = m->level;
            continue;
        }
        while (m->len &&
               (m->level != level || (m->len != j->len && !j->escaped) ||
                !llmcbi_json_is_text(j, llmcbi_slice(m->name, m->len))))
            m++;
        if (m->len && !m->types) return true;
        type = llmcbi_json_next(j);
        start = j->p - 1;
        to = (char *)out + m->at;
        if (m->opens && type == LLMCBI_JSON_OBJECT) {
            level = m->opens;
            *(bool *)to = true;
            continue;
        }
        llmcbi_json_skip(j, type);
        if (m->types & ~LLMCBI_OR_NONE)
            llmcbi_wire_keep(j, type, start, m->types, to);
    }
    return false;
}

/* Comes to the next object of an array; false: there is none. */
static bool llmcbi_wire_element(llmcbi_json *j)
{
    llmcbi_json_type type;

    while ((type = llmcbi_json_next(j)) != LLMCBI_JSON_OBJECT) {
        if (type == LLMCBI_JSON_ARRAY_END || type == LLMCBI_JSON_ERROR)
            return false;
        llmcbi_json_skip(j, type);
    }
    return true;
}

/* The next element of "choices"; false: there is none. */
static bool llmcbi_wire_next_choice(llmcbi_json *j, llmcbi_wire_choice *c)
{
#define LLMCBI_AT(m) offsetof(llmcbi_wire_choice, m)
    static const llmcbi_wanted members[] = {
        LLMCBI_WANTED(0, 0, LLMCBI_A_NUMBER, LLMCBI_AT(index), "index"),
        LLMCBI_WANTED(0, 1, LLMCBI_OR_NONE, LLMCBI_AT(has_delta), "delta"),
        LLMCBI_WANTED(0, 1, LLMCBI_OR_NONE, LLMCBI_AT(has_delta), "message"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING, LLMCBI_AT(finish_reason),
                      "finish_reason"),
        LLMCBI_WANTED(0, 0, LLMCBI_AN_OBJECT, LLMCBI_AT(logprobs), "logprobs"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_STRING, LLMCBI_AT(text), "content"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_STRING, LLMCBI_AT(refusal), "refusal"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_STRING | LLMCBI_OR_NONE | LLMCBI_OR_EMPTY,
                      LLMCBI_AT(reasoning), "reasoning_content"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_STRING | LLMCBI_OR_NONE | LLMCBI_OR_EMPTY,
                      LLMCBI_AT(reasoning), "reasoning"), /* some send both */
        LLMCBI_WANTED(1, 0, LLMCBI_AN_ARRAY, LLMCBI_AT(tool_calls),
                      "tool_calls"),
        LLMCBI_WANTED(1, 0, LLMCBI_AN_OBJECT, LLMCBI_AT(function_call),
                      "function_call"),
        LLMCBI_WANTED(0, 0, 0, 0, "")
    };
#undef LLMCBI_AT

    if (!llmcbi_wire_element(j)) return false;
    memset(c, 0, sizeof *c);
    llmcbi_wire_object(j, members, 0, c);
    return true;
}

static void llmcbi_wire_choices(llmcbi_json *j, llmcbi_wire_event *ev)
{
    llmcbi_json_type type = llmcbi_json_next(j);
    uint32_t depth = j->depth;

    if (type != LLMCBI_JSON_ARRAY) {
        llmcbi_json_skip(j, type);
        return;
    }
    ev->has_choice = llmcbi_wire_next_choice(j, &ev->choice);
    if (!ev->has_choice) return;
    ev->rest = *j;
    type = llmcbi_json_next(j);
    ev->more = type != LLMCBI_JSON_ARRAY_END;
    while (j->depth >= depth && type != LLMCBI_JSON_ERROR)
        type = llmcbi_json_next(j);
}

static void llmcbi_wire_usage(llmcbi_json *j, llmcb_usage *u)
{
#define LLMCBI_AT(m) offsetof(llmcb_usage, m)
    static const llmcbi_wanted members[] = {
        LLMCBI_WANTED(0, 0, LLMCBI_A_NUMBER, LLMCBI_AT(input_tokens),
                      "prompt_tokens"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_NUMBER, LLMCBI_AT(output_tokens),
                      "completion_tokens"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_NUMBER, LLMCBI_AT(total_tokens),
                      "total_tokens"),
        LLMCBI_WANTED(0, 1, LLMCBI_OR_NONE, LLMCBI_AT(known),
                      "prompt_tokens_details"),
        LLMCBI_WANTED(0, 2, LLMCBI_OR_NONE, LLMCBI_AT(known),
                      "completion_tokens_details"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_NUMBER, LLMCBI_AT(cached_tokens),
                      "cached_tokens"),
        LLMCBI_WANTED(2, 0, LLMCBI_A_NUMBER, LLMCBI_AT(reasoning_tokens),
                      "reasoning_tokens"),
        LLMCBI_WANTED(0, 0, 0, 0, "")
    };
#undef LLMCBI_AT
    llmcbi_json_type type = llmcbi_json_next(j);

    if (type != LLMCBI_JSON_OBJECT) {
        llmcbi_json_skip(j, type);
        return;
    }
    memset(u, 0, sizeof *u);
    u->known = true;
    llmcbi_wire_object(j, members, 0, u);
    if (!u->total_tokens) u->total_tokens = u->input_tokens + u->output_tokens;
}

/* Reads one event. false: it is not one whole JSON object. */
static bool llmcbi_wire_read(const char *ptr, size_t len, llmcbi_wire_event *ev,
                             bool *too_deep)
{
#define LLMCBI_AT(m) offsetof(llmcbi_wire_event, m)
    static const llmcbi_wanted members[] = {
        LLMCBI_WANTED(0, 0, 0, 0, "choices"),
        LLMCBI_WANTED(0, 0, 0, 0, "usage"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING, LLMCBI_AT(model), "model"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING, LLMCBI_AT(id), "id"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING, LLMCBI_AT(fingerprint),
                      "system_fingerprint"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING | LLMCBI_AN_OBJECT,
                      LLMCBI_AT(error), "error"),
        LLMCBI_WANTED(0, 0, 0, 0, "")
    };
#undef LLMCBI_AT
    llmcbi_json j;

    memset(ev, 0, sizeof *ev);
    llmcbi_json_init(&j, ptr, len);
    if (llmcbi_json_next(&j) != LLMCBI_JSON_OBJECT) return false;
    while (llmcbi_wire_object(&j, members, 0, ev)) {
        if (llmcbi_json_is(&j, "usage"))
            llmcbi_wire_usage(&j, &ev->usage);
        else
            llmcbi_wire_choices(&j, ev);
    }
    if (ev->error.ptr && !ev->error.object) { /* with its quotes */
        ev->error.ptr--;
        ev->error.len += 2;
    }
    *too_deep = j.too_deep;
    return llmcbi_json_whole(&j);
}

/* What a provider says of an error: an object with message, type and code
 * (perhaps inside "error", then that alone counts), or a string. */
static void llmcbi_wire_error(llmcb_error *e, const char *ptr, size_t len)
{
    struct said {
        llmcbi_raw message, type, code;
    } said;
#define LLMCBI_AT(m) offsetof(struct said, m)
    static const llmcbi_wanted members[] = {
        LLMCBI_WANTED(0, 0, 0, 0, "error"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING | LLMCBI_OR_NONE,
                      LLMCBI_AT(message), "message"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING | LLMCBI_OR_NONE, LLMCBI_AT(type),
                      "type"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING | LLMCBI_OR_NONE | LLMCBI_A_NUMBER,
                      LLMCBI_AT(code), "code"),
        LLMCBI_WANTED(0, 0, 0, 0, "")
    };
#undef LLMCBI_AT
    llmcbi_json j;
    llmcbi_json_type type;
    size_t used;

    memset(&said, 0, sizeof said);
    llmcbi_json_init(&j, ptr, len);
    do {
        type = llmcbi_json_next(&j);
        if (type == LLMCBI_JSON_OBJECT)
            said.message.len = 0;
        else
            llmcbi_json_skip(&j, type);
        llmcbi_wire_keep(&j, type, NULL, LLMCBI_A_STRING | LLMCBI_OR_NONE,
                         &said.message);
    } while ((type == LLMCBI_JSON_OBJECT || j.depth) &&
             llmcbi_wire_object(&j, members, 0, &said));
    llmcbi_json_clean(e->type, sizeof e->type, said.type.ptr, said.type.len);
    llmcbi_json_clean(e->provider_code, sizeof e->provider_code, said.code.ptr,
                      said.code.len);
    if (!said.message.len) return;
    llmcbi_error_add(e, ": ", 2);
    used = strlen(e->message);
    llmcbi_json_clean(e->message + used, sizeof e->message - used,
                      said.message.ptr, said.message.len);
    if (!e->message[used]) e->message[used - 2] = '\0'; /* half a character */
}

/* -- the answer as it grows */

#define LLMCBI_TOOL_WHOLE 1
#define LLMCBI_TOOL_SPOILED 2
typedef struct llmcbi_tool_slot {
    int64_t index; /* as the server numbers it; -1: it does not */
    llmcbi_buf id, name, arguments;
    llmcbi_carry carry;
    /* arguments as far as somebody asked whether they are whole */
    size_t looked_at, depth;
    char where; /* 0, in a string: '"', behind a backslash, or as follows */
} llmcbi_tool_slot;

/* What most choices have none of. */
typedef struct llmcbi_rarity {
    llmcbi_buf refusal, reasoning, logprobs;
    llmcbi_carry refusal_carry, reasoning_carry;
    llmcbi_tool_slot *tools;
    llmcb_tool_call *calls; /* of the generation */
    size_t n_tools, tools_cap;
} llmcbi_rarity;

/* One choice; its public face is the generation of the same number. */
typedef struct llmcbi_choice {
    llmcbi_buf text;
    llmcbi_rarity *rare; /* NULL: nothing of it yet */
    llmcbi_carry text_carry;
    bool finished;
} llmcbi_choice;

static const llmcb_result *llmcbi_no_result(void)
{
    static const llmcb_result none = { false,     false,
                                       NULL,      0,
                                       { "", 0 }, { "", 0 },
                                       { "", 0 }, { false, 0, 0, 0, 0, 0 },
                                       false };

    return &none;
}

typedef struct llmcbi_answer {
    llmcbi_choice *choices;
    size_t total; /* bytes of text in all choices */
    llmcb_generation *generations;
    size_t n, cap;
    llmcb_result result;
} llmcbi_answer;

static void llmcbi_str_free(const llmcb_allocator *a, llmcb_str s)
{
    if (s.len) llmcbi_free(a, llmcbi_unconst(s.ptr), s.len + 1);
}

/* What llmcbi_str_free frees. false: no memory. */
static bool llmcbi_str_keep(const llmcb_allocator *a, llmcb_str *to,
                            llmcb_str s)
{
    char *p;

    if (!s.len) return true;
    p = (char *)llmcbi_alloc(a, s.len + 1);
    if (!p) return false;
    memcpy(p, s.ptr, s.len);
    *to = llmcbi_slice(p, s.len);
    return true;
}

LLMCBI_APART static void llmcbi_rarity_free(const llmcb_allocator *a,
                                            llmcbi_rarity *r)
{
    size_t k;

    llmcbi_buf_free(a, &r->refusal);
    llmcbi_buf_free(a, &r->reasoning);
    llmcbi_buf_free(a, &r->logprobs);
    for (k = 0; k < r->n_tools; k++) {
        llmcbi_buf_free(a, &r->tools[k].id);
        llmcbi_buf_free(a, &r->tools[k].name);
        llmcbi_buf_free(a, &r->tools[k].arguments);
    }
    llmcbi_free(a, r->tools,
                r->tools_cap * (sizeof *r->tools + sizeof *r->calls));
    llmcbi_free(a, r, sizeof *r);
}

static void llmcbi_answer_free(const llmcb_allocator *a, llmcbi_answer *w)
{
    size_t i;

    for (i = 0; i < w->n; i++) {
        llmcbi_buf_free(a, &w->choices[i].text);
        llmcbi_str_free(a, w->generations[i].finish_reason);
        if (w->choices[i].rare) llmcbi_rarity_free(a, w->choices[i].rare);
    }
    llmcbi_free(a, w->choices,
                w->cap * (sizeof *w->choices + sizeof *w->generations));
    llmcbi_str_free(a, w->result.model_name);
    llmcbi_str_free(a, w->result.id);
    llmcbi_str_free(a, w->result.system_fingerprint);
}

/* Makes room in two arrays that grow side by side, so that showing the answer
 * needs no memory: the second stands behind the first, in one block. NULL: no
 * memory. */
static void *llmcbi_grow_pair(const llmcb_allocator *a, void *block, size_t xs,
                              size_t ys, size_t *cap, size_t want)
{
    size_t n = *cap ? *cap : 1, had = *cap;
    char *grown;

    if (want <= had) return block;
    while (n < want)
        n *= 2;
    grown = (char *)llmcbi_alloc(a, n * (xs + ys));
    if (!grown) return NULL;
    if (had) {
        memcpy(grown, block, had * xs);
        memcpy(grown + n * xs, (char *)block + had * xs, had * ys);
    }
    llmcbi_free(a, block, had * (xs + ys));
    *cap = n;
    return grown;
}

static llmcbi_choice *llmcbi_answer_choice(const llmcb_allocator *a,
                                           llmcbi_answer *w, size_t index)
{
    void *block = llmcbi_grow_pair(a, w->choices, sizeof *w->choices,
                                   sizeof *w->generations, &w->cap, index + 1);

    if (!block) return NULL;
    w->choices = (llmcbi_choice *)block;
    w->generations = (llmcb_generation *)(void *)(w->choices + w->cap);
    if (w->n <= index) w->n = index + 1;
    return &w->choices[index];
}

/* Makes w->result show what has come. Allocates nothing. */
LLMCBI_APART static void llmcbi_answer_show(llmcbi_answer *w, bool complete)
{
    llmcbi_rarity none;
    size_t i, k;

    memset(&none, 0, sizeof none);
    for (i = 0; i < w->n; i++) {
        const llmcbi_choice *c = &w->choices[i];
        const llmcbi_rarity *r = c->rare ? c->rare : &none;
        llmcb_generation *g = &w->generations[i];
        if (c->text.len) c->text.ptr[c->text.len] = '\0'; /* more was tried */
        g->text = llmcbi_buf_str(&c->text);
        g->refusal = llmcbi_buf_str(&r->refusal);
        g->reasoning = llmcbi_buf_str(&r->reasoning);
        g->logprobs = llmcbi_buf_str(&r->logprobs);
        if (!g->finish_reason.len) g->finish_reason = llmcbi_slice("", 0);
        g->tool_calls = r->calls;
        g->n_tool_calls = r->n_tools;
        for (k = 0; k < r->n_tools; k++) {
            llmcb_tool_call *call = &r->calls[k];
            call->id = llmcbi_buf_str(&r->tools[k].id);
            call->name = llmcbi_buf_str(&r->tools[k].name);
            call->arguments = llmcbi_buf_str(&r->tools[k].arguments);
            call->valid =
                call->name.len &&
                (!call->arguments.len ||
                 llmcbi_json_is_one(call->arguments, LLMCBI_JSON_OBJECT));
        }
    }
    w->result.complete = complete;
    w->result.generations = w->generations;
    w->result.n_generations = w->n;
}

/* Keeps a scalar of the answer; the first one counts. */
static bool llmcbi_answer_note(const llmcb_allocator *a, llmcb_str *to,
                               const llmcbi_raw *raw)
{
    llmcbi_json j;
    llmcbi_buf b;
    bool ok;

    if (!raw->len || raw->len >= 4096 || to->len) return true;
    memset(&j, 0, sizeof j);
    memset(&b, 0, sizeof b);
    j.str = raw->ptr;
    j.len = raw->len;
    llmcbi_json_text(a, &b, &j);
    ok = !b.failed && llmcbi_str_keep(a, to, llmcbi_buf_str(&b));
    llmcbi_buf_free(a, &b);
    return ok;
}

/* -- tool calls: what servers send, made into calls */

/* One element of "tool_calls". */
typedef struct llmcbi_tool_piece {
    int64_t index; /* -1: none that can be used */
    llmcbi_raw id, name;
    llmcbi_raw arguments; /* as a string, or JSON itself */
    bool has_function;
} llmcbi_tool_piece;

LLMCBI_APART static void
llmcbi_wire_function(llmcbi_json *j, llmcbi_tool_piece *p, unsigned level)
{
#define LLMCBI_AT(m) offsetof(llmcbi_tool_piece, m)
    static const llmcbi_wanted members[] = {
        LLMCBI_WANTED(0, 0, LLMCBI_A_NUMBER | LLMCBI_OR_NONE, LLMCBI_AT(index),
                      "index"),
        LLMCBI_WANTED(0, 0, LLMCBI_A_STRING, LLMCBI_AT(id), "id"),
        LLMCBI_WANTED(0, 1, LLMCBI_OR_NONE, LLMCBI_AT(has_function),
                      "function"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_STRING, LLMCBI_AT(name), "name"),
        LLMCBI_WANTED(1, 0, LLMCBI_A_STRING | LLMCBI_AN_OBJECT,
                      LLMCBI_AT(arguments), "arguments"),
        LLMCBI_WANTED(0, 0, 0, 0, "")
    };
#undef LLMCBI_AT

    memset(p, 0, sizeof *p);
    p->index = -1;
    llmcbi_wire_object(j, members, level, p);
}

static bool llmcbi_wire_next_tool(llmcbi_json *j, llmcbi_tool_piece *p)
{
    if (!llmcbi_wire_element(j)) return false;
    llmcbi_wire_function(j, p, 0);
    return true;
}

/* Whether a decoded text is that of a JSON string. */
static bool llmcbi_buf_is_raw(const llmcbi_buf *b, const llmcbi_raw *raw)
{
    llmcbi_json j;

    j.str = raw->ptr;
    j.len = raw->len;
    j.escaped = !raw->plain;
    return llmcbi_json_is_text(&j, llmcbi_buf_str(b));
}

/* The last call with that number, or with that id; n_tools: none. */
static size_t llmcbi_tool_with(const llmcbi_rarity *r,
                               const llmcbi_tool_piece *p, bool by_id)
{
    size_t i;

    if (by_id ? !p->id.len : p->index < 0) return r->n_tools;
    for (i = r->n_tools; i-- > 0;) {
        const llmcbi_tool_slot *s = &r->tools[i];
        if (by_id ? llmcbi_buf_is_raw(&s->id, &p->id) : s->index == p->index)
            return i;
    }
    return r->n_tools;
}

/* Whether arguments are an object that is complete, each byte of them being
 * looked at once however often that is asked. */
static bool llmcbi_tool_is_whole(llmcbi_tool_slot *s)
{
    while (s->looked_at < s->arguments.len) {
        char c = s->arguments.ptr[s->looked_at++];
        if (s->where == '\\') {
            s->where = '"';
        } else if (s->where == '"') {
            if (c == '"') s->where = 0;
            if (c == '\\') s->where = c;
        } else if (s->where == LLMCBI_TOOL_WHOLE) {
            if ((unsigned char)c > ' ') s->where = LLMCBI_TOOL_SPOILED;
        } else if (s->where == 0) {
            if (c == '"') s->where = c;
            if (c == '{' || c == '[') s->depth++;
            if ((c == '}' || c == ']') && --s->depth == 0)
                s->where = llmcbi_json_is_one(
                               llmcbi_slice(s->arguments.ptr, s->looked_at),
                               LLMCBI_JSON_OBJECT)
                               ? LLMCBI_TOOL_WHOLE
                               : LLMCBI_TOOL_SPOILED;
        }
    }
    return s->where == LLMCBI_TOOL_WHOLE;
}

/* The call that a piece belongs to, n_tools for a new one. A number that the
 * server gives decides first, then the id. A name opens a new call when the
 * one found has another name, another id, or arguments that are whole:
 * servers give every call the same number, a new id with each piece, the
 * name with each piece, or none of it. */
static size_t llmcbi_tool_find(const llmcbi_rarity *r,
                               const llmcbi_tool_piece *p)
{
    size_t found = llmcbi_tool_with(r, p, false);
    llmcbi_tool_slot *s;

    if (found == r->n_tools && (p->index < 0 || !p->name.len))
        found = llmcbi_tool_with(r, p, true);
    if (found == r->n_tools) {
        if (p->index >= 0 || !r->n_tools || (p->id.len && p->name.len))
            return r->n_tools;
        found = r->n_tools - 1; /* unnumbered: the last one goes on */
    }
    s = &r->tools[found];
    if (!p->name.len || !s->name.len) return found;
    if (p->id.len && s->id.len)
        return llmcbi_buf_is_raw(&s->id, &p->id) ? found : r->n_tools;
    return !llmcbi_buf_is_raw(&s->name, &p->name) || llmcbi_tool_is_whole(s)
               ? r->n_tools
               : found;
}

/* -- the request */

LLMCBI_DEF const char *llmcb_role_name(llmcb_role role)
{
    static const char *const names[] = { "user", "assistant", "system",
                                         "developer", "tool" };

    return (unsigned)role <= LLMCB_TOOL ? names[role] : NULL;
}

/* The content of a message, whose length the program may leave out. */
LLMCBI_APART static llmcb_str llmcbi_message_text(const llmcb_message *m)
{
    return m->content && m->content_len
               ? llmcbi_slice(m->content, m->content_len)
               : llmcb_text(m->content);
}

static bool llmcbi_str_valid(llmcb_str s)
{
    return llmcbi_utf8_valid(s.ptr, s.len);
}

/* What is wrong with a message, or LLMCB_OK. */
static llmcb_code llmcbi_message_check(const llmcb_message *m, const char **why)
{
    size_t i;

    *why = NULL;
    if (!llmcb_role_name(m->role)) *why = "a message has an unknown role";
    if (m->n_tool_calls && !m->tool_calls)
        *why = "a message has n_tool_calls but no tool_calls";
    if (m->role == LLMCB_TOOL && !m->tool_call_id)
        *why = "a tool message has no tool_call_id";
    if (m->parts &&
        !llmcbi_json_is_one(llmcb_text(m->parts), LLMCBI_JSON_ARRAY))
        *why = "the parts of a message are not a JSON array";
    if (*why) return LLMCB_EINVAL;
    if (!llmcbi_str_valid(llmcbi_message_text(m)) ||
        !llmcbi_str_valid(llmcb_text(m->parts)) ||
        !llmcbi_str_valid(llmcb_text(m->name)) ||
        !llmcbi_str_valid(llmcb_text(m->tool_call_id)))
        *why = "a message is not valid UTF-8";
    for (i = 0; i < m->n_tool_calls; i++) {
        const llmcb_tool_call *c = &m->tool_calls[i];
        if (!llmcbi_str_valid(c->id) || !llmcbi_str_valid(c->name) ||
            !llmcbi_str_valid(c->arguments))
            *why = "a tool call is not valid UTF-8";
    }
    return *why ? LLMCB_EUTF8 : LLMCB_OK;
}

static void llmcbi_wire_message(const llmcb_allocator *a, llmcbi_buf *b,
                                const llmcb_message *m)
{
    llmcb_str text = llmcbi_message_text(m);
    size_t i;

    llmcbi_buf_print(a, b,
                     "{\"role\":\"%s\",\"content\":", llmcb_role_name(m->role));
    if (m->parts || (m->n_tool_calls && !*text.ptr))
        llmcbi_buf_text(a, b, m->parts ? m->parts : "null");
    else
        llmcbi_buf_print(a, b, "\"%J\"", &text);
    if (m->name) llmcbi_buf_print(a, b, ",\"name\":\"%j\"", m->name);
    if (m->tool_call_id)
        llmcbi_buf_print(a, b, ",\"tool_call_id\":\"%j\"", m->tool_call_id);
    for (i = 0; i < m->n_tool_calls; i++) {
        const llmcb_tool_call *c = &m->tool_calls[i];
        llmcbi_buf_print(a, b,
                         "%s{\"type\":\"function\",\"id\":\"%J\",\"function\":"
                         "{\"name\":\"%J\",\"arguments\":\"%J\"}}",
                         i ? "," : ",\"tool_calls\":[", &c->id, &c->name,
                         &c->arguments);
    }
    llmcbi_buf_text(a, b, m->n_tool_calls ? "]}" : "}");
}

/* Whether a JSON object has a member; `extra` wins over what we would say. */
static bool llmcbi_has_member(const char *object, const char *name)
{
    llmcbi_json j;

    if (!object) return false;
    llmcbi_json_init(&j, object, strlen(object));
    if (llmcbi_json_next(&j) != LLMCBI_JSON_OBJECT) return false;
    while (llmcbi_json_next(&j) == LLMCBI_JSON_KEY) {
        if (llmcbi_json_is_text(&j, llmcb_text(name))) return true;
        llmcbi_json_skip(&j, llmcbi_json_next(&j));
    }
    return false;
}

/* Appends the members of a JSON object but for those that x or y has. */
static void llmcbi_wire_members(const llmcb_allocator *a, llmcbi_buf *b,
                                const char *object, const char *x,
                                const char *y)
{
    llmcbi_json j;
    llmcbi_buf name;

    if (!object) return;
    memset(&name, 0, sizeof name);
    llmcbi_json_init(&j, object, strlen(object));
    llmcbi_json_next(&j);
    while (llmcbi_json_next(&j) == LLMCBI_JSON_KEY) {
        llmcb_str key = llmcbi_slice(j.str, j.len), value;
        name.len = 0;
        llmcbi_json_text(a, &name, &j);
        llmcbi_json_raw(&j);
        value = llmcbi_slice(j.str, j.len);
        if (name.failed)
            b->failed = true;
        else if (!llmcbi_has_member(x, name.ptr) &&
                 !llmcbi_has_member(y, name.ptr))
            llmcbi_buf_print(a, b, "%s\"%S\":%S", b->len > 1 ? "," : "", &key,
                             &value);
    }
    llmcbi_buf_free(a, &name);
}

/* The members of the request but the messages, as a JSON object; y are those
 * of the call. What the program says wins over what we would say. */
static void llmcbi_wire_params(const llmcb_allocator *a, llmcbi_buf *b,
                               const llmcb_chat_desc *d, bool openai,
                               bool stream, const char *y)
{
    static const char *const limits[] = { "max_tokens",
                                          "max_completion_tokens" };
    const char *x = d->extra, *other = limits[!openai];
    llmcbi_buf ours;

    memset(&ours, 0, sizeof ours);
    llmcbi_buf_print(a, &ours, "{\"model\":\"%j\",\"stream\":%s", d->model,
                     stream ? "true" : "false");
    if (stream && !d->no_usage)
        llmcbi_buf_text(a, &ours,
                        ",\"stream_options\":{\"include_usage\":true}");
    if (d->max_tokens > 0 && !llmcbi_has_member(x, other) &&
        !llmcbi_has_member(y, other))
        llmcbi_buf_print(a, &ours, ",\"%s\":%d", limits[openai],
                         (int64_t)d->max_tokens);
    if (d->n > 1) llmcbi_buf_print(a, &ours, ",\"n\":%d", (int64_t)d->n);
    llmcbi_buf_text(a, &ours, "}");
    llmcbi_buf_text(a, b, "{");
    if (ours.failed)
        b->failed = true;
    else
        llmcbi_wire_members(a, b, ours.ptr, x, y);
    /* not among ours, where it would be one level deeper */
    if (d->tools && !llmcbi_has_member(x, "tools") &&
        !llmcbi_has_member(y, "tools"))
        llmcbi_buf_print(a, b, "%s\"tools\":%s", b->len > 1 ? "," : "",
                         d->tools);
    llmcbi_wire_members(a, b, x, y, NULL);
    llmcbi_wire_members(a, b, y, NULL, NULL);
    llmcbi_buf_text(a, b, "}");
    llmcbi_buf_free(a, &ours);
}

/* The whole body: the messages, then the members of `params`. */
static void llmcbi_wire_body(const llmcb_allocator *a, llmcbi_buf *b,
                             const llmcb_message *m, size_t n, llmcb_str params,
                             const char *extra)
{
    size_t i;

    if (llmcbi_has_member(extra, "messages")) {
        llmcbi_buf_add(a, b, params.ptr, params.len);
        return;
    }
    llmcbi_buf_text(a, b, "{\"messages\":[");
    for (i = 0; i < n; i++) {
        if (i) llmcbi_buf_text(a, b, ",");
        llmcbi_wire_message(a, b, &m[i]);
    }
    llmcbi_buf_text(a, b, params.len > 2 ? "]," : "]");
    llmcbi_buf_add(a, b, params.ptr + 1, params.len - 1);
}

/* The conversation as one text, for handlers of completion models. */
static void llmcbi_wire_prompt(const llmcb_allocator *a, llmcbi_buf *b,
                               const llmcb_message *m, size_t n)
{
    size_t i;

    for (i = 0; i < n; i++) {
        llmcb_role role = m[i].role;
        if (i) llmcbi_buf_text(a, b, "\n");
        llmcbi_buf_text(a, b,
                        role == LLMCB_USER        ? "Human: "
                        : role == LLMCB_ASSISTANT ? "AI: "
                        : role == LLMCB_TOOL      ? "Tool: "
                                                  : "System: ");
        llmcbi_buf_add(a, b, m[i].content, m[i].content_len);
    }
}

#ifndef LLMCB_NO_KIT
/* -- an answer that is kept */

/* Writes a result as the completion that brings it. */
static void llmcbi_wire_result(const llmcb_allocator *a, llmcbi_buf *b,
                               const llmcb_result *r)
{
    const llmcb_usage *u = &r->usage;
    size_t i, k;

    llmcbi_buf_print(
        a, b, "{\"id\":\"%J\",\"model\":\"%J\",\"system_fingerprint\":\"%J\"",
        &r->id, &r->model_name, &r->system_fingerprint);
    if (u->known)
        llmcbi_buf_print(
            a, b,
            ",\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,"
            "\"total_tokens\":%d,\"prompt_tokens_details\":"
            "{\"cached_tokens\":%d},\"completion_tokens_details\":"
            "{\"reasoning_tokens\":%d}}",
            u->input_tokens, u->output_tokens, u->total_tokens,
            u->cached_tokens, u->reasoning_tokens);
    for (i = 0; i < r->n_generations; i++) {
        const llmcb_generation *g = &r->generations[i];
        llmcbi_buf_print(a, b,
                         "%s{\"index\":%d,\"finish_reason\":\"%J\",\"message\":"
                         "{\"content\":\"%J\",\"refusal\":\"%J\","
                         "\"reasoning_content\":\"%J\"",
                         i ? "," : ",\"choices\":[", (int64_t)i,
                         &g->finish_reason, &g->text, &g->refusal,
                         &g->reasoning);
        for (k = 0; k < g->n_tool_calls; k++) {
            const llmcb_tool_call *call = &g->tool_calls[k];
            llmcbi_buf_print(a, b,
                             "%s{\"index\":%d,\"id\":\"%J\",\"function\":"
                             "{\"name\":\"%J\",\"arguments\":\"%J\"}}",
                             k ? "," : ",\"tool_calls\":[", (int64_t)k,
                             &call->id, &call->name, &call->arguments);
        }
        llmcbi_buf_text(a, b, k ? "]}}" : "}}");
    }
    llmcbi_buf_text(a, b, i ? "]}" : "}");
}
#endif

/* ==== [CHAT] generate, batch, stream, cancel =========================== */

typedef struct llmcbi_prompt llmcbi_prompt;

#ifndef LLMCB_NO_KIT
/* -- answers by request */

/* The key and then the answer stand behind it. */
typedef struct llmcbi_kept {
    struct llmcbi_kept *next;
    uint64_t hash;
    size_t key_len, len;
} llmcbi_kept;

struct llmcb_cache {
    const llmcb_loop *loop; /* not looked into */
    llmcb_allocator alloc;
    size_t refs; /* the program's and each chat's */
    size_t bytes, max_bytes;
    llmcbi_kept *first, **last; /* the oldest first */
};

LLMCBI_DEF llmcb_cache *llmcb_cache_new(llmcb_loop *loop, size_t max_bytes)
{
    llmcb_cache *c;

    if (llmcbi_enter(loop) != LLMCB_OK) return NULL;
    c = (llmcb_cache *)llmcbi_alloc(&loop->alloc, sizeof *c);
    if (!c) return NULL;
    c->loop = loop;
    c->alloc = loop->alloc;
    c->refs = 1;
    c->max_bytes = max_bytes ? max_bytes : (size_t)16 << 20;
    c->last = &c->first;
    return c;
}

static size_t llmcbi_kept_size(const llmcbi_kept *k)
{
    return sizeof *k + k->key_len + k->len;
}

static void llmcbi_cache_drop_oldest(llmcb_cache *c)
{
    llmcbi_kept *k = c->first;

    c->first = k->next;
    if (!c->first) c->last = &c->first;
    c->bytes -= llmcbi_kept_size(k);
    llmcbi_free(&c->alloc, k, llmcbi_kept_size(k));
}

LLMCBI_DEF void llmcb_cache_free(llmcb_cache *cache)
{
    llmcb_allocator a;

    if (!cache || --cache->refs) return;
    while (cache->first)
        llmcbi_cache_drop_oldest(cache);
    a = cache->alloc;
    llmcbi_free(&a, cache, sizeof *cache);
}

/* FNV-1a, to tell most keys apart at a glance. */
static uint64_t llmcbi_hash(llmcb_str s)
{
    uint64_t h = 0xCBF29CE484222325u;
    size_t i;

    for (i = 0; i < s.len; i++)
        h = (h ^ (unsigned char)s.ptr[i]) * 0x100000001B3u;
    return h;
}

static const llmcbi_kept *llmcbi_cache_find(const llmcb_cache *c, llmcb_str key)
{
    uint64_t hash = llmcbi_hash(key);
    const llmcbi_kept *k = c->first;

    while (k && (k->hash != hash || k->key_len != key.len ||
                 memcmp(k + 1, key.ptr, key.len) != 0))
        k = k->next;
    return k;
}

/* Keeps it if it fits; that there is no memory for it is no failure. */
static void llmcbi_cache_keep(llmcb_cache *c, llmcb_str key, llmcb_str answer)
{
    llmcbi_kept head, *k;

    memset(&head, 0, sizeof head);
    head.hash = llmcbi_hash(key);
    head.key_len = key.len;
    head.len = answer.len;
    if (llmcbi_kept_size(&head) > c->max_bytes || llmcbi_cache_find(c, key))
        return;
    k = (llmcbi_kept *)llmcbi_resize(&c->alloc, NULL, 0,
                                     llmcbi_kept_size(&head));
    if (!k) return;
    *k = head;
    memcpy(k + 1, key.ptr, key.len);
    memcpy((char *)(k + 1) + key.len, answer.ptr, answer.len);
    c->bytes += llmcbi_kept_size(k);
    *c->last = k;
    c->last = &k->next;
    while (c->bytes > c->max_bytes)
        llmcbi_cache_drop_oldest(c);
}

/* -- requests a minute */

/* One token is 60,000 units, so that a millisecond brings per_minute. */
#define LLMCBI_TOKEN 60000

struct llmcb_limiter {
    llmcb_loop *loop;
    size_t refs; /* the program's and each chat's */
    int64_t per_minute, most, level, at;
    llmcbi_timer timer;
    llmcbi_prompt *first, **last; /* who waits */
};

static void llmcbi_limiter_timer(llmcbi_timer *t);

LLMCBI_DEF llmcb_limiter *llmcb_limiter_new(llmcb_loop *loop,
                                            unsigned per_minute, unsigned burst)
{
    llmcb_limiter *l;

    if (llmcbi_enter(loop) != LLMCB_OK || !per_minute) return NULL;
    l = (llmcb_limiter *)llmcbi_alloc(&loop->alloc, sizeof *l);
    if (!l) return NULL;
    if (!llmcbi_timer_init(loop, &l->timer, llmcbi_limiter_timer)) {
        llmcbi_free(&loop->alloc, l, sizeof *l);
        return NULL;
    }
    l->loop = loop;
    l->refs = 1;
    l->per_minute = per_minute;
    l->most = (int64_t)LLMCBI_TOKEN * (burst ? burst : 1);
    l->at = loop->now;
    l->last = &l->first;
    return l;
}

LLMCBI_DEF void llmcb_limiter_free(llmcb_limiter *limiter)
{
    if (!limiter || --limiter->refs) return;
    llmcbi_timer_free(limiter->loop, &limiter->timer);
    llmcbi_free(&limiter->loop->alloc, limiter, sizeof *limiter);
}

/* Takes a token, or says in how many milliseconds there will be one. */
static int64_t llmcbi_limiter_take(llmcb_limiter *l)
{
    int64_t now = l->loop->now, gone = now - l->at;
    int64_t most = l->most;

    /* what the last millisecond of a wait brought too much is not lost */
    if (l->first) most += l->per_minute - 1;
    l->at = now;
    if (gone >= (most - l->level) / l->per_minute + 1)
        l->level = most;
    else if (gone > 0)
        l->level += gone * l->per_minute;
    if (l->level < LLMCBI_TOKEN)
        return (LLMCBI_TOKEN - l->level + l->per_minute - 1) / l->per_minute;
    l->level -= LLMCBI_TOKEN;
    return 0;
}
#endif /* LLMCB_NO_KIT */

/* -- chats */

/* What of a choice a string is, or is in. */
typedef enum llmcbi_like {
    LLMCBI_LIKE_TEXT,
    LLMCBI_LIKE_REASONING,
    LLMCBI_LIKE_TOOLS
} llmcbi_like;

/* An event that brings nothing but one string, without that: `head` bytes up to
 * it, `mid` bytes up to the end or to the padding, and what is behind the
 * padding. They stand behind this. The streams of a chat share it, but for a
 * beginning of their own, since each has its id. */
typedef struct llmcbi_pattern {
    size_t refs; /* the chat's, each prompt's */
    size_t len, head, mid;
    llmcbi_like kind;
    size_t before, behind; /* bytes of the member around the string */
} llmcbi_pattern;

/* A stream has some: its first event looks different, as does one with
 * padding. */
#define LLMCBI_PATTERNS 4

struct llmcb_chat {
    llmcb_loop *loop;
    size_t refs;         /* the program's and each call's */
    llmcb_pair *headers; /* one is free for the call's own */
    size_t n_headers;
    llmcb_chat_desc d; /* resolved; strings in the arena */
    llmcbi_arena arena;
    llmcb_error error; /* of the descriptor */
    char *url;
    const char *key; /* in the header's value; NULL: none */
    uint64_t identity;
    llmcbi_rules rules; /* of the runs of its prompts */
    llmcb_config own;   /* the lists of their configurations */
    llmcbi_pattern *patterns[LLMCBI_PATTERNS]; /* the newest of its streams */
    size_t last_pattern;
    bool openai; /* OpenAI's or Azure's own servers */
    bool azure;
};

/* -- the descriptor */

/* The first thing that is wrong is told; NULL: nothing is. */
static void llmcbi_chat_refuse(llmcb_chat *chat, llmcb_code code,
                               const char *message)
{
    if (message && chat->error.code == LLMCB_OK)
        llmcbi_error_set(&chat->error, code, message);
}

static const char *llmcbi_chat_copy(llmcb_chat *chat, const char *s)
{
    if (!s) return NULL;
    return llmcbi_arena_text(&chat->loop->alloc, &chat->arena, s, strlen(s));
}

LLMCBI_APART static bool llmcbi_header_name_ok(const char *s)
{
    size_t i;

    if (llmcbi_str_listed(llmcb_text(s),
                          "host content-length transfer-encoding connection "
                          "expect accept-encoding"))
        return false;
    for (i = 0; s[i]; i++)
        if (!llmcbi_token_char(s[i])) return false;
    return i > 0;
}

/* A key, or another value that goes into a header as it is. */
LLMCBI_APART static bool llmcbi_secret_ok(const char *s)
{
    size_t i;

    for (i = 0; s[i]; i++)
        if ((unsigned char)s[i] <= 0x20 || (unsigned char)s[i] >= 0x7F)
            return false;
    return i <= 16384;
}

static void llmcbi_limits_default(llmcb_limits *l)
{
    static const llmcb_limits usual = { 16384,
                                        65536,
                                        128,
                                        (size_t)16 << 20,
                                        (size_t)64 << 20,
                                        (size_t)16 << 20,
                                        128,
                                        128,
                                        65536,
                                        (size_t)1 << 30,
                                        1024,
                                        (size_t)1 << 20 };

    /* they hold nothing but sizes */
    size_t i, *limit = (size_t *)(void *)l;
    const size_t *otherwise = (const size_t *)(const void *)&usual;

    for (i = 0; i < sizeof usual / sizeof *limit; i++)
        if (!limit[i]) limit[i] = otherwise[i];
}

static bool llmcbi_ends_with(llmcb_str s, const char *tail)
{
    size_t n = strlen(tail);

    return s.len >= n && memcmp(s.ptr + s.len - n, tail, n) == 0;
}

/* base + "/chat/completions", before a query if there is one. */
static void llmcbi_chat_set_url(llmcb_chat *chat, const char *base)
{
    static const char path[] = "/chat/completions";
    const char *colon = llmcbi_str_begins(base, "unix:")
                            ? strchr(base + 5, ':')
                            : NULL; /* a socket's path has no query */
    const char *from = colon ? colon : base, *query = from + strcspn(from, "?");
    size_t len = (size_t)(query - base), n = strlen(base) + sizeof path;
    llmcbi_url u;
    const char *why;

    while (len && base[len - 1] == '/')
        len--;
    chat->url = (char *)llmcbi_arena_get(&chat->loop->alloc, &chat->arena, n);
    if (!chat->url) return;
    memcpy(chat->url, base, len);
    memcpy(chat->url + len, path, sizeof path);
    strcpy(chat->url + len + sizeof path - 1, query);
    why = llmcbi_url_parse(&u, chat->url);
    if (!why) {
        chat->azure = llmcbi_ends_with(u.host, ".azure.com");
        chat->openai =
            chat->azure || llmcbi_str_is_nocase(u.host, "api.openai.com");
        if (*chat->d.api_key && !u.tls && !chat->d.allow_cleartext_key &&
            !llmcbi_url_is_local(&u))
            why = "an API key would go out in clear text: use https://, or set "
                  "allow_cleartext_key";
    }
    llmcbi_chat_refuse(chat, LLMCB_EINVAL, why);
}

static void llmcbi_chat_header(llmcb_chat *chat, const char *key,
                               const char *value)
{
    llmcb_pair *h = &chat->headers[chat->n_headers++];

    h->key = key;
    h->value = value;
}

static void llmcbi_chat_set_headers(llmcb_chat *chat)
{
    const llmcb_allocator *a = &chat->loop->alloc;
    const llmcb_chat_desc *d = &chat->d;
    size_t i, len = strlen(d->api_key);
    size_t before = chat->azure ? 0 : 7; /* Bearer and a blank */
    char *auth;

    chat->headers = (llmcb_pair *)llmcbi_arena_get(
        a, &chat->arena, (d->n_headers + 7) * sizeof *chat->headers);
    auth = (char *)llmcbi_arena_get(a, &chat->arena, before + len + 1);
    if (!chat->headers || !auth) return;
    llmcbi_chat_header(chat, "Content-Type", "application/json");
    llmcbi_chat_header(chat, "Accept", "text/event-stream, application/json");
    llmcbi_chat_header(chat, "User-Agent", "llmcb/" LLMCB_VERSION);
    if (*d->organization)
        llmcbi_chat_header(chat, "OpenAI-Organization", d->organization);
    for (i = 0; i < d->n_headers; i++) {
        const llmcb_pair *h = &d->headers[i];
        if (!h->key || !h->value || !llmcbi_header_name_ok(h->key) ||
            !llmcbi_clean_text(h->value)) {
            llmcbi_chat_refuse(chat, LLMCB_EINVAL,
                               "a header has a bad name or holds a control "
                               "character");
            return;
        }
        llmcbi_chat_header(chat, llmcbi_chat_copy(chat, h->key),
                           llmcbi_chat_copy(chat, h->value));
    }
    if (!len) return;
    /* the only copy of the key, apart from those on their way out */
    memcpy(auth, "Bearer ", before);
    chat->key = strcpy(auth + before, d->api_key);
    llmcbi_chat_header(chat, chat->azure ? "api-key" : "Authorization", auth);
}

/* Copies of the lists that serve the chat's own runs. */
LLMCBI_APART static void llmcbi_chat_copy_lists(llmcb_chat *chat)
{
    const llmcb_allocator *a = &chat->loop->alloc;
    const llmcb_chat_desc *d = &chat->d;
    llmcb_config *own = &chat->own;
    char digits[24];
    llmcb_pair ls[] = { { "ls_provider", "openai" },
                        { "ls_model_name", d->model },
                        { "ls_model_type", "chat" },
                        { "ls_max_tokens", NULL } };
    llmcbi_setup s;

    ls[3].value = llmcbi_decimal(digits, d->max_tokens);
    own->local_metadata = ls;
    own->n_local_metadata = d->max_tokens > 0 ? 4 : 3;
    memset(&s, 0, sizeof s);
    s.handlers = (llmcb_handler **)llmcbi_arena_get(
        a, &chat->arena, own->n_callbacks * sizeof *s.handlers);
    llmcbi_setup_tags(a, &chat->arena, &s, own);
    llmcbi_setup_metadata(a, &chat->arena, &s, own);
    if (!chat->arena.failed)
        llmcbi_setup_add(&s, own->callbacks, own->n_callbacks);
    memset(own, 0, sizeof *own);
    own->callbacks = s.handlers;
    own->n_callbacks = s.n_handlers;
    own->tags = s.tags;
    own->n_tags = s.n_tags;
    own->metadata = s.metadata;
    own->n_metadata = s.n_metadata;
}

static const char *llmcbi_env(const char *given, const char *name,
                              const char *otherwise)
{
    if (given) return given;
    given = getenv(name);
    return given && *given ? given : otherwise;
}

LLMCBI_APART static void llmcbi_ms(int64_t *ms, int64_t otherwise)
{
    *ms = *ms ? llmcbi_span(*ms) : otherwise;
}

/* What is wrong with a descriptor, but for its lists and its address. */
static const char *llmcbi_chat_wrong(const llmcb_chat *chat, bool no_address)
{
    const llmcb_chat_desc *d = &chat->d;

    if (!llmcbi_secret_ok(d->api_key))
        return "api_key holds a blank, line end, control or non-ASCII "
               "character, or is too long";
    if (!llmcbi_secret_ok(d->organization))
        return "organization holds a bad character";
    if (no_address && !*d->api_key && !d->transport)
        return "no API key: set OPENAI_API_KEY, or api_key, or base_url for a "
               "server that needs none";
    if (!llmcbi_json_text_is(d->tools, LLMCBI_JSON_ARRAY))
        return "tools is not a JSON array";
    if (!llmcbi_json_text_is(d->extra, LLMCBI_JSON_OBJECT))
        return "extra is not a JSON object";
#ifndef LLMCB_ALLOW_INSECURE_TLS
    if (d->insecure_tls)
        return "insecure_tls needs a build with LLMCB_ALLOW_INSECURE_TLS";
#endif
#if defined(LLMCB_NO_CURL) && defined(LLMCB_NO_SOCKETS)
    if (!d->transport) return "there is no transport: this build has none";
#endif
    if (d->transport && d->transport->loop != chat->loop)
        return "the transport belongs to another loop, or to none";
#ifndef LLMCB_NO_KIT
    if (d->limiter && d->limiter->loop != chat->loop)
        return "the limiter belongs to another loop";
    if (d->cache && d->cache->loop != chat->loop)
        return "the cache belongs to another loop";
#endif
    return NULL;
}

static void llmcbi_chat_resolve(llmcb_chat *chat)
{
    llmcb_chat_desc *d = &chat->d;
    llmcb_config *own = &chat->own;
    const char *base, *why;
    llmcb_code code;
    bool no_address = !*llmcbi_env(d->base_url, "OPENAI_BASE_URL", "");

    own->callbacks = d->callbacks;
    own->n_callbacks = d->n_callbacks;
    own->tags = d->tags;
    own->n_tags = d->n_tags;
    own->metadata = d->metadata;
    own->n_metadata = d->n_metadata;
    if ((d->n_callbacks && !d->callbacks) || (d->n_tags && !d->tags) ||
        (d->n_metadata && !d->metadata) || (d->n_headers && !d->headers))
        llmcbi_chat_refuse(chat, LLMCB_EINVAL, "a list is NULL");
    why = llmcbi_config_check(chat->loop, own, &code);
    llmcbi_chat_refuse(chat, code, why);
    if (chat->error.code != LLMCB_OK) {
        memset(own, 0, sizeof *own);
        d->n_headers = 0;
    }
    base =
        llmcbi_env(d->base_url, "OPENAI_BASE_URL", "https://api.openai.com/v1");
    d->api_key = llmcbi_env(d->api_key, "OPENAI_API_KEY", "");
    d->organization = llmcbi_chat_copy(
        chat, llmcbi_env(d->organization, "OPENAI_ORG_ID", ""));
    d->model = llmcbi_chat_copy(chat, d->model ? d->model : "gpt-4o-mini");
    d->tools = llmcbi_chat_copy(chat, d->tools);
    d->extra = llmcbi_chat_copy(chat, d->extra);
    d->ca_file = llmcbi_chat_copy(chat, d->ca_file);
    if (d->n < 1) d->n = 1;
    if (!d->max_retries) d->max_retries = 2;
    if (d->max_retries < 0) d->max_retries = 0;
    llmcbi_ms(&d->connect_ms, 10000);
    llmcbi_ms(&d->first_byte_ms, 600000);
    llmcbi_ms(&d->idle_ms, 120000);
    llmcbi_ms(&d->total_ms, LLMCB_FOREVER);
    llmcbi_limits_default(&d->limits);
    llmcbi_chat_refuse(chat, LLMCB_EINVAL, llmcbi_chat_wrong(chat, no_address));
    if (!llmcbi_str_valid(llmcb_text(d->model)))
        llmcbi_chat_refuse(chat, LLMCB_EUTF8, "model is not valid UTF-8");
    llmcbi_chat_set_url(chat, base);
    llmcbi_chat_set_headers(chat);
    llmcbi_chat_copy_lists(chat);
    d->api_key = NULL; /* the caller's; ours is in a header */
#ifndef LLMCB_NO_KIT
    if (chat->error.code != LLMCB_OK) { /* they may be another loop's */
        d->limiter = NULL;
        d->cache = NULL;
    }
    if (d->limiter) d->limiter->refs++;
    if (d->cache) d->cache->refs++;
#endif
}

#if LLMCBI_QUICK
static void llmcbi_pattern_unref(const llmcb_allocator *a, llmcbi_pattern *q)
{
    if (q && !--q->refs) llmcbi_free(a, q, sizeof *q + q->len);
}
#endif

static void llmcbi_chat_unref(llmcb_chat *chat)
{
    const llmcb_allocator *a = &chat->loop->alloc;
    llmcbi_arena_block *b;

    if (--chat->refs) return;
#if LLMCBI_QUICK
    for (chat->last_pattern = 0; chat->last_pattern < LLMCBI_PATTERNS;)
        llmcbi_pattern_unref(a, chat->patterns[chat->last_pattern++]);
#endif
#ifndef LLMCB_NO_KIT
    llmcb_limiter_free(chat->d.limiter);
    llmcb_cache_free(chat->d.cache);
#endif
    /* the key, and further headers that may be keys */
    for (b = chat->arena.blocks; b; b = b->next)
        llmcbi_wipe(b + 1, b->size - sizeof *b);
    llmcbi_arena_free(a, &chat->arena);
    llmcbi_free(a, chat, sizeof *chat);
}

/* The parts of a chunk that has none. */
LLMCBI_APART static void llmcbi_parts_clear(llmcb_parts *parts)
{
    memset(parts, 0, sizeof *parts);
    parts->refusal = parts->reasoning = parts->finish_reason = parts->logprobs =
        llmcbi_slice("", 0);
}

static void llmcbi_prompt_told(llmcbi_run *run);

static void llmcbi_chat_rule(llmcb_chat *chat)
{
    chat->rules.told = llmcbi_prompt_told;
    chat->rules.handler_ms = llmcbi_span(chat->d.handler_ms);
    chat->rules.window_events = chat->d.limits.window_events;
    chat->rules.window_bytes = chat->d.limits.window_bytes;
    llmcbi_parts_clear(&chat->rules.no_parts);
}

LLMCBI_DEF llmcb_chat *llmcb_chat_new(llmcb_loop *loop,
                                      const llmcb_chat_desc *desc)
{
    llmcb_chat *chat;

    if (llmcbi_enter(loop) != LLMCB_OK) return NULL;
    chat = (llmcb_chat *)llmcbi_alloc(&loop->alloc, sizeof *chat);
    if (!chat) return NULL;
    chat->loop = loop;
    chat->refs = 1;
    chat->identity = ++loop->last_identity;
    if (desc) chat->d = *desc;
    llmcbi_error_set(&chat->error, LLMCB_OK, NULL);
    llmcbi_chat_resolve(chat);
    llmcbi_chat_rule(chat);
    if (chat->arena.failed) {
        llmcbi_chat_unref(chat);
        return NULL;
    }
    return chat;
}

LLMCBI_DEF const llmcb_error *llmcb_chat_error(const llmcb_chat *chat)
{
    return chat ? &chat->error : llmcbi_error_const(LLMCB_ENOMEM);
}

LLMCBI_DEF void llmcb_chat_free(llmcb_chat *chat)
{
    if (chat) llmcbi_chat_unref(chat);
}

/* -- a call: one or more prompts, one run each */

typedef enum llmcbi_phase {
    LLMCBI_PHASE_NONE,
    LLMCBI_PHASE_CONNECT = LLMCB_DETAIL_CONNECT, /* if it takes too long */
    LLMCBI_PHASE_FIRST_BYTE = LLMCB_DETAIL_FIRST_BYTE,
    LLMCBI_PHASE_IDLE = LLMCB_DETAIL_IDLE, /* the body is coming */
    LLMCBI_PHASE_BACKOFF
} llmcbi_phase;

typedef enum llmcbi_body_kind {
    LLMCBI_BODY_UNKNOWN, /* until its first byte */
    LLMCBI_BODY_STREAM,
    LLMCBI_BODY_JSON,
    LLMCBI_BODY_ERROR /* of a status that is no success */
} llmcbi_body_kind;

typedef struct llmcbi_call llmcbi_call;

/* What is sent, with its headers behind it. */
typedef struct llmcbi_asked {
    llmcb_request request;
    llmcbi_buf body;
} llmcbi_asked;

/* What the start event shows, until it has been told. */
typedef struct llmcbi_talk {
    llmcb_start start; /* first, so that run->start leads here */
    llmcbi_arena arena;
} llmcbi_talk;

/* One prompt. */
struct llmcbi_prompt {
    llmcbi_run run; /* first, so that a run leads here */
    /* With the last part of the run, what each token needs: a stream that
     * is one of many has left the cache when its next token comes. */
    llmcb_chat *chat;           /* of the call */
    const llmcb_error *outcome; /* NULL: not known yet */
    int64_t last_data;
    llmcbi_pattern *pattern; /* of the last event that was text alone */
    char *own;               /* the beginning of its own */
    uint16_t n_own;
    uint8_t vain; /* events remembered, and none like them came */
    bool alike;   /* that was the last event; the input stands behind it */
    bool stream;  /* tokens are told */
    uint8_t phase, body_kind;
    int8_t should_retry; /* -1, 0, 1 */
    bool html, encoded;  /* what the head says of the body */
    bool sent;           /* the transport has no need of the request */
    bool got_body;       /* some byte of a success has come: no retry */
    bool got_chunk;
    bool sentinel;
    bool launched;         /* its first request has been made */
    bool over;             /* the exchange is to be let go of */
    bool orderly;          /* and its response was complete */
    bool limited;          /* it waits for the limiter */
    bool cached;           /* the answer comes from the cache */
    bool usage_told;       /* of the event that is kept in body */
    uint32_t choices_told; /* likewise */
    /* A body that is no stream, a redirect's target, or an event of which
     * some choices must wait. */
    llmcbi_buf body;
    llmcbi_answer answer;

    llmcbi_call *call;
    llmcb_exchange *x;
    llmcbi_sse sse;
    llmcbi_asked *asked; /* NULL: it is not needed any more */
    llmcbi_timer timer;
    int64_t phase_due, total_due; /* 0: none; absolute */
    int64_t paused_at;
    int64_t retry_after;
    int attempt;
    int status;
    llmcb_str request_id;
    llmcbi_prompt *next_limited;
};

struct llmcbi_call {
    llmcb_op op;
    llmcb_chat *chat;
    bool pull;
    bool cancelled;
    bool orphaned;      /* destroyed but for a worker inside a handler */
    uint32_t n;         /* prompts */
    uint32_t max_open;  /* at a time */
    uint32_t told;      /* prompts whose error has been told, in order */
    llmcbi_ready ready; /* looks what can go on */
    llmcbi_arena arena;
    llmcbi_prompt *prompts;
    const llmcb_error *late; /* a failure that changed no event */
};

static void llmcbi_prompt_decide(llmcbi_prompt *p, llmcb_error *e);

static llmcbi_prompt *llmcbi_prompt_of(llmcbi_run *run)
{
    return (llmcbi_prompt *)(void *)run;
}

static const llmcb_allocator *llmcbi_prompt_alloc(const llmcbi_prompt *p)
{
    return &p->run.loop->alloc;
}

/* -- the outcome of a prompt */

/* The outcome is this code; of a success the message does not matter. */
static void llmcbi_prompt_close(llmcbi_prompt *p, llmcb_code code,
                                llmcb_detail detail, const char *message)
{
    llmcb_error e;

    llmcbi_error_set(&e, code, message);
    e.detail = detail;
    llmcbi_prompt_decide(p, &e);
}

static void llmcbi_prompt_fail(llmcbi_prompt *p, llmcb_code code,
                               const char *message)
{
    llmcbi_prompt_close(p, code, LLMCB_DETAIL_NONE, message);
}

/* A server may echo the key in its error, and the error may be cut within
 * it. */
static void llmcbi_hide(char *text, const char *secret)
{
    size_t n = strlen(secret), len = strlen(text);
    char *at;

    if (n < 4) return;
    for (at = text; (at = strstr(at, secret)) != NULL; at += n)
        memset(at, '*', n);
    for (n = n < len ? n : len; n >= 4; n--)
        if (memcmp(text + len - n, secret, n) == 0)
            memset(text + len - n, '*', n);
}

static void llmcbi_hide_in(llmcb_error *e, const char *secret)
{
    llmcbi_hide(e->message, secret);
    llmcbi_hide(e->type, secret);
    llmcbi_hide(e->provider_code, secret);
    llmcbi_hide(e->request_id, secret);
}

static void llmcbi_prompt_complete_error(llmcbi_prompt *p, llmcb_error *e)
{
    const llmcb_chat *chat = p->chat;
    size_t i;

    e->attempt = p->attempt;
    if (!e->http_status) e->http_status = p->status;
    if (e->retry_after_ms < 0) e->retry_after_ms = p->retry_after;
    llmcbi_copy_clean(e->request_id, sizeof e->request_id, p->request_id.ptr,
                      p->request_id.len);
    if (chat->key) llmcbi_hide_in(e, chat->key);
    /* behind three of our own: others may be keys too; a short one is none */
    for (i = 3; i < chat->n_headers; i++) {
        const char *value = chat->headers[i].value;
        const char *blank = strrchr(value, ' '); /* Bearer, and then the key */
        if (blank) value = blank + 1;
        if (strlen(value) >= 8) llmcbi_hide_in(e, value);
    }
}

/* A character that was cut in two and will not be completed becomes one
 * last token. */
static void llmcbi_prompt_flush_carries(llmcbi_prompt *p);
#ifndef LLMCB_NO_KIT
static void llmcbi_prompt_unlimit(llmcbi_prompt *p);
#endif
static bool llmcbi_prompt_retry(llmcbi_prompt *p, const llmcb_error *e);

/* The one place where an outcome becomes known. code LLMCB_OK: success. */
static void llmcbi_prompt_decide(llmcbi_prompt *p, llmcb_error *e)
{
    if (p->outcome) return;
    llmcbi_prompt_complete_error(p, e);
    if (llmcbi_prompt_retry(p, e)) return;
    if (e->code != LLMCB_ECANCELLED && p->run.state == LLMCBI_RUN_OPEN)
        llmcbi_prompt_flush_carries(p);
#ifndef LLMCB_NO_KIT
    if (p->limited) llmcbi_prompt_unlimit(p);
#endif
    p->outcome = llmcbi_error_keep(llmcbi_prompt_alloc(p), e);
    p->over = true;
    llmcbi_timer_stop(p->run.loop, &p->timer);
    p->phase = LLMCBI_PHASE_NONE;
    p->paused_at = 0;
    if (p->run.state != LLMCBI_RUN_NEW) llmcbi_run_drain(&p->run);
    llmcbi_make_ready(p->run.loop, &p->call->ready);
}

/* -- timeouts: one timer for the phase and the whole */

static void llmcbi_prompt_arm(llmcbi_prompt *p)
{
    llmcb_loop *loop = p->run.loop;
    int64_t due = p->phase_due;

    if (!due || (p->total_due && p->total_due < due)) due = p->total_due;
    if (due && !p->paused_at)
        llmcbi_timer_start(loop, &p->timer, due - loop->now);
    else
        llmcbi_timer_stop(loop, &p->timer);
}

static void llmcbi_prompt_set_phase(llmcbi_prompt *p, llmcbi_phase phase,
                                    int64_t ms)
{
    int64_t now = p->run.loop->now;

    p->phase = (uint8_t)phase;
    p->phase_due = ms < 0 ? 0 : now + ms;
    if (p->phase_due == 0 && ms == 0) p->phase_due = 1;
    p->last_data = now;
    llmcbi_prompt_arm(p);
}

/* The library itself holds the transport: the clocks stand still. */
static void llmcbi_prompt_pause(llmcbi_prompt *p)
{
    p->run.starved = true;
    llmcbi_run_wake(&p->run); /* sets the mark */
    if (!p->paused_at) p->paused_at = p->run.loop->now;
    if (!p->paused_at) p->paused_at = 1;
    llmcbi_timer_stop(p->run.loop, &p->timer);
}

static void llmcbi_prompt_unpause(llmcbi_prompt *p)
{
    int64_t now = p->run.loop->now, held = now - p->paused_at;

    p->run.starved = false;
    p->paused_at = 0;
    p->last_data = now;
    if (p->phase == LLMCBI_PHASE_IDLE && p->phase_due)
        p->phase_due = now + p->chat->d.idle_ms;
    if (p->total_due && held > 0) p->total_due += held;
    llmcbi_prompt_arm(p);
}

/* -- events of a stream */

/* Bytes that decoding takes at the most, whatever the carry holds. */
static size_t llmcbi_raw_room(const llmcbi_raw *raw)
{
    return (raw->plain ? raw->len : 3 * raw->len) + 7;
}

static inline llmcb_str llmcbi_raw_decode(char **at, const llmcbi_raw *raw,
                                          llmcbi_carry *carry)
{
    size_t n;

    if (raw->plain && !carry->n && !carry->high) {
        n = raw->len;
        if (n) memcpy(*at, raw->ptr, n);
    } else {
        n = llmcbi_json_decode(*at, raw->ptr, raw->len, carry);
    }
    (*at)[n] = '\0';
    *at += n + 1;
    return llmcbi_slice(*at - n - 1, n);
}

/* The same for a string that no later piece goes on with. */
static llmcb_str llmcbi_raw_whole(char **at, const llmcbi_raw *raw)
{
    llmcbi_carry c;
    llmcb_str s;
    char *end;

    memset(&c, 0, sizeof c);
    s = llmcbi_raw_decode(at, raw, &c);
    end = llmcbi_carry_flush(*at - 1, &c);
    *end = '\0';
    *at = end + 1;
    s.len = (size_t)(end - s.ptr);
    return s;
}

/* One choice of an event on its way into the answer and into the log. That
 * it failed is told when it is safe: telling it may append. */
typedef struct llmcbi_maker {
    llmcbi_prompt *p;
    const llmcb_allocator *a;
    const llmcb_limits *limits;
    llmcbi_choice *c;
    char *at; /* where its record goes on */
    bool failed;
    const char *why; /* the limit; NULL: no memory */
} llmcbi_maker;

static void llmcbi_maker_limit(llmcbi_maker *m, const char *why)
{
    m->failed = true;
    m->why = why;
}

/* Whether n more bytes of text fit into the answer; then they count. */
LLMCBI_APART static bool llmcbi_maker_fits(llmcbi_maker *m, size_t n)
{
    m->p->answer.total += n;
    if (m->p->answer.total > m->limits->text)
        llmcbi_maker_limit(m, "the answer exceeds limits.text");
    return !m->failed;
}

static void llmcbi_maker_add(llmcbi_maker *m, llmcbi_buf *b, llmcb_str s)
{
    llmcbi_buf_add(m->a, b, s.ptr, s.len);
    if (b->failed) m->failed = true;
}

/* Decodes a string into the record and adds it to what the answer has.
 * carry NULL: no later piece goes on with it. */
static void llmcbi_maker_text(llmcbi_maker *m, const llmcbi_raw *raw,
                              llmcbi_carry *carry, llmcbi_buf *b,
                              llmcb_str *shown)
{
    if (!raw->len || m->failed) return;
    *shown = carry ? llmcbi_raw_decode(&m->at, raw, carry)
                   : llmcbi_raw_whole(&m->at, raw);
    if (llmcbi_maker_fits(m, shown->len)) llmcbi_maker_add(m, b, *shown);
}

/* The slot of a piece, new if need be; NULL: failed. */
static llmcbi_tool_slot *llmcbi_maker_tool(llmcbi_maker *m,
                                           const llmcbi_tool_piece *piece)
{
    llmcbi_rarity *r = m->c->rare;
    size_t i = llmcbi_tool_find(r, piece);
    void *block;

    if (i < r->n_tools) return &r->tools[i];
    if (i >= m->limits->tool_calls) {
        llmcbi_maker_limit(m, "more tool calls than limits.tool_calls");
        return NULL;
    }
    block = llmcbi_grow_pair(m->a, r->tools, sizeof *r->tools, sizeof *r->calls,
                             &r->tools_cap, i + 1);
    if (!block) {
        m->failed = true;
        return NULL;
    }
    r->tools = (llmcbi_tool_slot *)block;
    r->calls = (llmcb_tool_call *)(void *)(r->tools + r->tools_cap);
    r->n_tools++;
    r->tools[i].index = piece->index;
    return &r->tools[i];
}

/* One piece into its call and into the delta that handlers see. */
static void llmcbi_maker_piece(llmcbi_maker *m, const llmcbi_tool_piece *piece,
                               llmcb_tool_delta *delta)
{
    const llmcbi_raw *raw = &piece->arguments;
    llmcbi_tool_slot *s;

    if (m->failed) return;
    s = llmcbi_maker_tool(m, piece);
    if (!s) return;
    delta->index = (size_t)(s - m->c->rare->tools);
    delta->id = delta->name = delta->arguments = llmcbi_slice("", 0);
    if (!s->id.len) llmcbi_maker_text(m, &piece->id, NULL, &s->id, &delta->id);
    if (!s->name.len)
        llmcbi_maker_text(m, &piece->name, NULL, &s->name, &delta->name);
    if (m->failed || !raw->len || (raw->object && s->arguments.len)) return;
    delta->arguments =
        raw->object
            ? llmcbi_record_utf8(&m->at, llmcbi_slice(raw->ptr, raw->len))
            : llmcbi_raw_decode(&m->at, raw, &s->carry);
    if (s->arguments.len + delta->arguments.len > m->limits->arguments)
        llmcbi_maker_limit(m, "a tool call exceeds limits.arguments");
    else
        llmcbi_maker_add(m, &s->arguments, delta->arguments);
}

/* The pieces of one event, the last of them in *piece; with out NULL it only
 * counts. */
static size_t llmcbi_maker_tools(llmcbi_maker *m, const llmcbi_wire_choice *w,
                                 llmcbi_tool_piece *piece,
                                 llmcb_tool_delta *out)
{
    llmcbi_json j;
    size_t n = 0;

    if (w->tool_calls.len) {
        llmcbi_json_init(&j, w->tool_calls.ptr, w->tool_calls.len);
        llmcbi_json_next(&j);
        for (; llmcbi_wire_next_tool(&j, piece); n++)
            if (out) llmcbi_maker_piece(m, piece, &out[n]);
    }
    if (w->function_call.len) {
        llmcbi_json_init(&j, w->function_call.ptr, w->function_call.len);
        llmcbi_json_next(&j);
        llmcbi_wire_function(&j, piece, 1);
        piece->index = 0;
        if (out) llmcbi_maker_piece(m, piece, &out[n]);
        n++;
    }
    return n;
}

/* One more element of an array, which stays whole if it fails. */
static void llmcbi_maker_logprobs(llmcbi_maker *m, llmcbi_buf *b, llmcb_str s)
{
    if (!llmcbi_maker_fits(m, s.len)) return;
    if (!llmcbi_buf_reserve(m->a, b, s.len + 2)) {
        m->failed = true;
        return;
    }
    if (b->len)
        b->ptr[b->len - 1] = ','; /* the bracket */
    else
        llmcbi_buf_text(m->a, b, "[");
    llmcbi_buf_add(m->a, b, s.ptr, s.len);
    llmcbi_buf_text(m->a, b, "]");
}

/* The reason that counts is the first one. */
static void llmcbi_maker_finished(llmcbi_maker *m, llmcb_str reason)
{
    const llmcbi_answer *answer = &m->p->answer;
    llmcb_generation *g = &answer->generations[m->c - answer->choices];
    char clean[32];

    if (m->c->finished) return;
    m->c->finished = true;
    llmcbi_copy_clean(clean, sizeof clean, reason.ptr, reason.len);
    if (!llmcbi_str_keep(m->a, &g->finish_reason, llmcb_text(clean)))
        m->failed = true;
}

/* What a choice brings beside text, into the record behind `parts`. */
LLMCBI_APART static void llmcbi_maker_parts(llmcbi_maker *m,
                                            const llmcbi_wire_choice *w,
                                            llmcb_parts *parts, size_t n_tools,
                                            llmcbi_tool_piece *piece)
{
    llmcb_tool_delta *tools = (llmcb_tool_delta *)(void *)m->at;
    llmcbi_rarity *r = m->c->rare;

    if (n_tools) {
        m->at += n_tools * sizeof *tools;
        if (n_tools == 1) /* mostly; it has been read */
            llmcbi_maker_piece(m, piece, tools);
        else
            llmcbi_maker_tools(m, w, piece, tools);
        parts->tool_calls = tools;
        parts->n_tool_calls = n_tools;
    }
    if (r) {
        llmcbi_maker_text(m, &w->refusal, &r->refusal_carry, &r->refusal,
                          &parts->refusal);
        llmcbi_maker_text(m, &w->reasoning, &r->reasoning_carry, &r->reasoning,
                          &parts->reasoning);
    }
    if (m->failed) return;
    if (w->finish_reason.len) {
        parts->finish_reason = llmcbi_raw_whole(&m->at, &w->finish_reason);
        llmcbi_maker_finished(m, parts->finish_reason);
    }
    if (w->logprobs.len) {
        parts->logprobs = llmcbi_record_utf8(
            &m->at, llmcbi_slice(w->logprobs.ptr, w->logprobs.len));
        llmcbi_maker_logprobs(m, &r->logprobs, parts->logprobs);
    }
}

/* A chunk without parts in a record that has not been committed, with room
 * behind it; NULL: no memory. */
LLMCBI_APART static llmcb_chunk *llmcbi_prompt_chunk(llmcbi_prompt *p,
                                                     size_t choice, size_t room)
{
    llmcb_chunk *chunk = (llmcb_chunk *)(void *)llmcbi_run_reserve(
        &p->run, sizeof *chunk + room);

    if (!chunk) return NULL;
    chunk->choice = (int)choice;
    chunk->parts = &p->run.rules->no_parts;
    chunk->text = llmcbi_slice("", 0);
    return chunk;
}

/* The choice and the record. false: it failed; no reason is no memory. */
static bool llmcbi_maker_make(llmcbi_maker *m, size_t index,
                              const llmcbi_wire_choice *w,
                              const llmcb_usage *usage)
{
    llmcbi_prompt *p = m->p;
    llmcbi_choice *c = llmcbi_answer_choice(m->a, &p->answer, index);
    llmcbi_tool_piece piece;
    size_t n_tools = llmcbi_maker_tools(NULL, w, &piece, NULL);
    size_t room = llmcbi_raw_room(&w->text);
    bool rare =
        n_tools || w->refusal.len || w->reasoning.len || w->logprobs.len;
    bool has_parts = rare || usage || w->finish_reason.len;
    llmcb_parts *parts;
    llmcb_chunk *chunk;

    if (n_tools > m->limits->tool_calls)
        llmcbi_maker_limit(m, "more tool calls than limits.tool_calls");
    if (!c || m->failed) return false;
    m->c = c;
    if (rare && !c->rare) {
        c->rare = (llmcbi_rarity *)llmcbi_alloc(m->a, sizeof *c->rare);
        if (!c->rare) return false;
    }
    if (has_parts)
        room +=
            sizeof *parts + n_tools * (sizeof(llmcb_tool_delta) + 32) +
            llmcbi_raw_room(&w->refusal) + llmcbi_raw_room(&w->reasoning) +
            llmcbi_raw_room(&w->finish_reason) + 7 +
            3 * (w->logprobs.len + w->tool_calls.len + w->function_call.len);
    chunk = llmcbi_prompt_chunk(p, index, room);
    if (!chunk) return false;
    m->at = (char *)(chunk + 1);
    if (has_parts) {
        parts = (llmcb_parts *)(void *)m->at;
        m->at = (char *)(parts + 1);
        *parts = *chunk->parts;
        chunk->parts = parts;
        if (usage) parts->usage = *usage;
        llmcbi_maker_parts(m, w, parts, n_tools, &piece);
    }
    llmcbi_maker_text(m, &w->text, &c->text_carry, &c->text, &chunk->text);
    if (!m->failed && p->stream && !p->cached)
        llmcbi_run_commit(&p->run, LLMCB_LLM_NEW_TOKEN,
                          (size_t)(m->at - (char *)chunk));
    return !m->failed;
}

/* One choice of an event: into the answer and, in a stream, into the log. */
static bool llmcbi_prompt_choice(llmcbi_prompt *p, const llmcbi_wire_choice *w,
                                 const llmcb_usage *usage)
{
    uint64_t index = w->index < 0 ? 0 : (uint64_t)w->index;
    llmcbi_maker m;

    memset(&m, 0, sizeof m);
    m.p = p;
    m.a = llmcbi_prompt_alloc(p);
    m.limits = &p->chat->d.limits;
    if (index >= m.limits->choices)
        llmcbi_maker_limit(&m, "more choices than limits.choices");
    else if (llmcbi_maker_make(&m, (size_t)index, w, usage))
        return true;
    llmcbi_prompt_fail(p, m.why ? LLMCB_ELIMIT : LLMCB_ENOMEM, m.why);
    return false;
}

LLMCBI_APART static void llmcbi_prompt_flush_carries(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    size_t i;

    for (i = 0; i < p->answer.n; i++) {
        llmcbi_choice *c = &p->answer.choices[i];
        llmcb_chunk *chunk;
        char lost[16], *at;
        size_t n = (size_t)(llmcbi_carry_flush(lost, &c->text_carry) - lost);
        if (!n) continue;
        /* told and kept, or neither */
        if (!llmcbi_buf_reserve(a, &c->text, n)) return;
        chunk = llmcbi_prompt_chunk(p, i, sizeof lost);
        if (!chunk) return;
        at = (char *)(chunk + 1);
        chunk->text = llmcbi_record_text(&at, lost, n);
        llmcbi_buf_add(a, &c->text, lost, n);
        if (p->stream)
            llmcbi_run_commit(&p->run, LLMCB_LLM_NEW_TOKEN,
                              (size_t)(at - (char *)chunk));
    }
}

/* The choices of an event from number `skip` on. true: all have been told;
 * false: it failed, or there is no room (p->choices_told says how far). */
static bool llmcbi_prompt_tell(llmcbi_prompt *p, llmcbi_wire_event *ev,
                               size_t skip)
{
    const llmcb_usage *usage = ev->usage.known ? &ev->usage : NULL;
    llmcbi_wire_choice *w = &ev->choice;
    size_t i = 0;
    bool any = ev->has_choice;

    if (!any && usage) { /* alone */
        memset(w, 0, sizeof *w);
        return llmcbi_prompt_choice(p, w, usage);
    }
    for (; any; i++) {
        if (i >= p->chat->d.limits.choices) {
            llmcbi_prompt_fail(p, LLMCB_ELIMIT,
                               "more choices than limits.choices");
            return false;
        }
        if (i >= skip && (w->has_delta || w->finish_reason.len)) {
            if (i > skip && !llmcbi_run_has_room(&p->run)) {
                p->choices_told = (uint32_t)i;
                p->usage_told = !usage;
                return false;
            }
            if (!llmcbi_prompt_choice(p, w, usage)) return false;
            p->got_chunk = true;
            usage = NULL; /* once an event */
        }
        any = ev->more && llmcbi_wire_next_choice(&ev->rest, w);
    }
    return true;
}

static void llmcbi_prompt_api_error(llmcbi_prompt *p, const char *ptr,
                                    size_t len)
{
    llmcb_error e;

    llmcbi_error_set(&e, LLMCB_EAPI, NULL);
    llmcbi_wire_error(&e, ptr, len);
    llmcbi_prompt_decide(p, &e);
}

/* Reads an event, and notes what it says of the whole answer. false: it
 * failed. */
static bool llmcbi_prompt_read(llmcbi_prompt *p, llmcb_str data, bool cut,
                               llmcbi_wire_event *ev)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    llmcb_result *r = &p->answer.result;
    bool too_deep = false;

    if (!llmcbi_wire_read(data.ptr, data.len, ev, &too_deep)) {
        if (cut)
            llmcbi_prompt_fail(p, LLMCB_ETRUNCATED, NULL);
        else if (too_deep)
            llmcbi_prompt_fail(p, LLMCB_ELIMIT,
                               "the answer's JSON is nested too deeply");
        else
            llmcbi_prompt_fail(
                p, LLMCB_EJSON,
                "the answer holds an event that is not valid JSON");
        return false;
    }
    if (ev->error.len) {
        llmcbi_prompt_api_error(p, ev->error.ptr, ev->error.len);
        return false;
    }
    if (ev->usage.known) r->usage = ev->usage;
    if (llmcbi_answer_note(a, &r->model_name, &ev->model) &&
        llmcbi_answer_note(a, &r->id, &ev->id) &&
        llmcbi_answer_note(a, &r->system_fingerprint, &ev->fingerprint))
        return true;
    llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
    return false;
}

#if LLMCBI_QUICK
/* Copied at once, however much of it is text: the length of a token cannot be
 * guessed, so a branch on it costs more than the bytes. */
#define LLMCBI_SHORT 16

/* How many bytes of text that stands for itself the answer takes without a
 * further look. */
static size_t llmcbi_prompt_room(const llmcbi_prompt *p)
{
    const llmcbi_choice *c = &p->answer.choices[0];
    size_t room = c->text.cap - c->text.len;
    size_t left = p->chat->d.limits.text - p->answer.total;

    if (!p->stream || c->text_carry.n || c->text_carry.high) return 0;
    return room < left ? room : left;
}

/* Lets inline handlers have what is in the log; then tokens may pass it by,
 * unless there are others. */
static bool llmcbi_prompt_direct(llmcbi_prompt *p)
{
    while (p->run.slowest < p->run.head && llmcbi_run_serve_inline(&p->run)) {
    }
    return p->stream && llmcbi_run_direct(&p->run);
}

/* Takes n bytes, with room for more than LLMCBI_SHORT, that stand behind the
 * text of the answer: they are all that an event brings. false: there is no
 * memory, or the next one may not be told directly. */
static inline bool llmcbi_prompt_take(llmcbi_prompt *p, size_t n, bool direct)
{
    llmcbi_buf *b = &p->answer.choices[0].text;
    char *text = b->ptr + b->len, *copy = NULL;

    if (!direct && p->stream) {
        copy = llmcbi_run_reserve(&p->run, n + LLMCBI_SHORT);
        if (!copy) {
            llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
            return false;
        }
        if (n < LLMCBI_SHORT)
            memcpy(copy, text, LLMCBI_SHORT);
        else
            memcpy(copy, text, n);
        copy[n] = '\0';
    }
    text[n] = '\0';
    b->len += n;
    p->answer.total += n;
    if (direct) return llmcbi_run_tell(&p->run, llmcbi_slice(text, n));
    if (copy) llmcbi_run_commit(&p->run, LLMCBI_TEXT, n + 1);
    return true;
}

/* The same of any text. */
static bool llmcbi_prompt_text(llmcbi_prompt *p, const llmcbi_raw *raw,
                               bool direct)
{
    llmcbi_choice *c = &p->answer.choices[0];
    llmcbi_buf *b = &c->text;
    char *at;
    size_t n;

    if (!llmcbi_buf_reserve(llmcbi_prompt_alloc(p), b,
                            llmcbi_raw_room(raw) + LLMCBI_SHORT)) {
        llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
        return false;
    }
    at = b->ptr + b->len;
    n = llmcbi_raw_decode(&at, raw, &c->text_carry).len;
    if (p->answer.total + n > p->chat->d.limits.text) {
        llmcbi_prompt_fail(p, LLMCB_ELIMIT, "the answer exceeds limits.text");
        return false;
    }
    return llmcbi_prompt_take(p, n, direct);
}

/* The same of a choice that brings something else, in a string that differs. */
static void llmcbi_prompt_member(llmcbi_prompt *p, const llmcbi_raw *string)
{
    const llmcbi_pattern *q = p->pattern;
    llmcbi_wire_choice w;

    memset(&w, 0, sizeof w);
    if (q->kind == LLMCBI_LIKE_REASONING) {
        w.reasoning = *string;
    } else {
        w.tool_calls.ptr = string->ptr - q->before;
        w.tool_calls.len = q->before + string->len + q->behind;
    }
    llmcbi_prompt_choice(p, &w, NULL);
}

/* The rest of a string that begins at raw->ptr. Returns its closing quote, or
 * NULL: there is none, or this is no JSON. */
static const char *llmcbi_raw_close(llmcbi_raw *raw, const char *end)
{
    const char *s = llmcbi_json_plain(raw->ptr, end);
    llmcbi_json j;

    raw->object = false;
    raw->plain = s < end && *s == '"';
    if (!raw->plain) {
        j.p = s;
        j.end = end;
        if (!llmcbi_json_string(&j)) return NULL;
        s = j.p - 1;
    }
    raw->len = (size_t)(s - raw->ptr);
    return s;
}

/* Decodes the text at s, *n bytes then, if it is simple and less than `room`,
 * which is more than LLMCBI_SHORT. Returns its closing quote, or where else
 * that came to an end. */
static inline const char *llmcbi_text_simple(char *out, size_t room,
                                             const char *s, const char *end,
                                             size_t *n)
{
    const char *from = s;

    s = llmcbi_json_plain(s, end);
    *n = (size_t)(s - from);
    if (*n <= LLMCBI_SHORT && end - from >= LLMCBI_SHORT)
        memcpy(out, from, LLMCBI_SHORT);
    else if (*n < room)
        memcpy(out, from, *n);
    else
        return end;
    if (s < end && *s != '"') {
        size_t left = room - *n - 1;
        const char *far = (size_t)(end - s) < left ? end : s + left;
        *n = (size_t)(llmcbi_json_copy(out + *n, &s, far) - out);
    }
    return s;
}

/* The end of an event whose string ends at s, if what follows is like the
 * pattern's; else NULL. */
static inline const char *llmcbi_pattern_end(const char *s, const char *end,
                                             const char *behind, size_t mid,
                                             size_t tail)
{
    /* the quote by itself: another byte there is all that comes often */
    if ((size_t)(end - s) < mid || *s != '"' || memcmp(s, behind, mid) != 0)
        return NULL;
    s += mid;
    if (!tail) return s;
    s = llmcbi_json_plain(s, end);
    if ((size_t)(end - s) < tail || memcmp(s, behind + mid, tail) != 0)
        return NULL;
    return s + tail;
}

/* Most events of a stream differ from the one before in nothing but their
 * text, their reasoning or the arguments of a tool call, and in padding that
 * OpenAI adds. If all around is equal, byte for byte, and these are JSON
 * strings, then the whole event has been read before. Takes as many such events
 * as there are and as have room, from *pieces on, which goes with them; false:
 * none. */
static bool llmcbi_prompt_same_again(llmcbi_prompt *p, llmcb_str **pieces,
                                     const llmcb_str *stop)
{
    const llmcbi_pattern *q = p->pattern;
    size_t len = q->len, n_own = p->n_own, n_shared = q->head - n_own;
    size_t mid = q->mid, tail = len - q->head - mid;
    size_t most = p->chat->d.limits.event, room = 0;
    const char *shared = (const char *)(q + 1) + n_own;
    const char *behind = shared + n_shared;
    uint64_t until = llmcbi_run_until(&p->run);
    llmcb_str *piece = *pieces;
    const char *from = piece->ptr;
    bool text = q->kind == LLMCBI_LIKE_TEXT, direct;

    direct = text && llmcbi_prompt_direct(p);
    if (text) room = llmcbi_prompt_room(p);
    do {
        const char *s = piece->ptr, *end = s + piece->len, *next = NULL;
        llmcbi_raw raw;
        size_t n = 0;
        bool simple;
        if (piece->len > most && piece->len - most > 2)
            end = s + most + 2; /* no event is longer */
        if ((size_t)(end - s) < len ||
            (n_own && memcmp(s, p->own, n_own) != 0) ||
            memcmp(s + n_own, shared, n_shared) != 0)
            break;
        raw.ptr = s + n_own + n_shared;
        if (room > LLMCBI_SHORT) { /* mostly, and then that is it */
            const llmcbi_buf *b = &p->answer.choices[0].text;
            s = llmcbi_text_simple(b->ptr + b->len, room, raw.ptr, end, &n);
            next = llmcbi_pattern_end(s, end, behind, mid, tail);
        }
        simple = next != NULL;
        if (!simple) {
            s = llmcbi_raw_close(&raw, end);
            if (!s || (!raw.len && q->kind == LLMCBI_LIKE_REASONING))
                break; /* if empty, another member may have brought it */
            next = llmcbi_pattern_end(s, end, behind, mid, tail);
            if (!next) break;
        }
        piece->len -= (size_t)(next - piece->ptr);
        piece->ptr = next;
        if (!text) {
            llmcbi_prompt_member(p, &raw);
        } else if (simple) {
            room -= n;
            if (!llmcbi_prompt_take(p, n, direct)) break;
        } else {
            if (!llmcbi_prompt_text(p, &raw, direct)) break;
            room = llmcbi_prompt_room(p);
        }
        if (!piece->len) {
            if (piece + 1 == stop) break;
            piece++;
        }
    } while (!p->outcome &&
             (direct || (p->run.head < until &&
                         p->run.held <= p->run.rules->window_bytes)));
    if ((*pieces)->ptr == from) return false;
    *pieces = piece;
    p->last_data = p->run.loop->now;
    p->vain = 0;
    return true;
}

/* The same of the data of one event, however it came: in parts, or with other
 * line ends. */
static bool llmcbi_prompt_same_data(llmcbi_prompt *p, llmcb_str data)
{
    const llmcbi_pattern *q = p->pattern;
    const char *s = data.ptr, *end = s + data.len, *like;
    size_t tail, head, own;
    llmcbi_raw raw;

    if (!q || data.len < q->len - 8) return false;
    like = (const char *)(q + 1) + 6; /* behind "data: " */
    head = q->head - 6;
    own = p->n_own ? p->n_own - 6u : 0;
    tail = q->len - q->head - q->mid;
    if ((own && memcmp(s, p->own + 6, own) != 0) ||
        memcmp(s + own, like + own, head - own) != 0)
        return false;
    raw.ptr = s + head;
    s = llmcbi_raw_close(&raw, end);
    if (!s || (!raw.len && q->kind == LLMCBI_LIKE_REASONING)) return false;
    s = tail ? llmcbi_pattern_end(s, end, like + head, q->mid, tail - 2)
             : llmcbi_pattern_end(s, end, like + head, q->mid - 2, 0);
    if (s != end) return false;
    if (q->kind == LLMCBI_LIKE_TEXT)
        llmcbi_prompt_text(p, &raw, llmcbi_prompt_direct(p));
    else
        llmcbi_prompt_member(p, &raw);
    p->alike = true;
    return true;
}

/* Where the padding of an event begins: a member that nobody reads, of random
 * length and always the last. NULL: it has none. */
static const char *llmcbi_prompt_padding(llmcb_str data, const char *from)
{
    static const char key[] = "\"obfuscation\":\"";
    const char *s = data.ptr + data.len - 2;

    if (s <= from || memcmp(s, "\"}", 2) != 0) return NULL;
    while (s > from && s[-1] != '"')
        s--;
    return (size_t)(s - from) >= sizeof key &&
                   memcmp(s - (sizeof key - 1), key, sizeof key - 1) == 0
               ? s
               : NULL;
}

static void llmcbi_prompt_unlearn(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);

    llmcbi_free(a, p->own, p->n_own);
    llmcbi_pattern_unref(a, p->pattern);
    p->own = NULL;
    p->n_own = 0;
    p->pattern = NULL;
    p->alike = false;
}

/* An event cut as a pattern is: what is before its string, behind "data: ",
 * what follows up to the padding, and what is behind that or, without it, at
 * the end of any event. */
typedef struct llmcbi_shape {
    llmcb_str head, mid, tail;
    bool padded;
    llmcbi_like kind;
    size_t before, behind;
} llmcbi_shape;

static llmcbi_pattern *llmcbi_pattern_new(const llmcb_allocator *a,
                                          const llmcbi_shape *s)
{
    size_t len = 6 + s->head.len + s->mid.len + s->tail.len;
    llmcbi_pattern *q =
        (llmcbi_pattern *)llmcbi_resize(a, NULL, 0, sizeof *q + len);
    char *at;

    if (!q) return NULL;
    at = (char *)(q + 1);
    q->refs = 1;
    q->len = len;
    q->head = 6 + s->head.len;
    q->mid = s->mid.len + (s->padded ? 0 : s->tail.len);
    q->kind = s->kind;
    q->before = s->before;
    q->behind = s->behind;
    memcpy(at, "data: ", 6);
    memcpy(at + 6, s->head.ptr, s->head.len);
    memcpy(at + q->head, s->mid.ptr, s->mid.len);
    memcpy(at + q->head + s->mid.len, s->tail.ptr, s->tail.len);
    return q;
}

/* Whether q differs from it at most before the string. */
static bool llmcbi_pattern_fits(const llmcbi_pattern *q, const llmcbi_shape *s)
{
    const char *behind = (const char *)(q + 1) + 6 + s->head.len;

    return q->head == 6 + s->head.len && q->kind == s->kind &&
           q->before == s->before &&
           q->len == q->head + s->mid.len + s->tail.len &&
           memcmp(behind, s->mid.ptr, s->mid.len) == 0; /* tails by length */
}

/* The chat's pattern of this shape, new if need be; NULL: no memory. */
static llmcbi_pattern *llmcbi_chat_pattern(llmcb_chat *chat,
                                           const llmcbi_shape *s)
{
    const llmcb_allocator *a = &chat->loop->alloc;
    llmcbi_pattern **at = chat->patterns, *q;
    size_t i;

    for (i = 0; i < LLMCBI_PATTERNS; i++)
        if (at[i] && llmcbi_pattern_fits(at[i], s)) return at[i];
    q = llmcbi_pattern_new(a, s);
    if (!q) return NULL;
    at += chat->last_pattern++ % LLMCBI_PATTERNS;
    llmcbi_pattern_unref(a, *at);
    *at = q;
    return q;
}

/* Makes q the pattern of p, whose own beginning has n bytes. */
static bool llmcbi_prompt_adopt(llmcbi_prompt *p, llmcbi_pattern *q, size_t n)
{
    if (q == p->pattern && n == p->n_own) return true;
    q->refs++;
    llmcbi_prompt_unlearn(p);
    p->pattern = q;
    if (n) p->own = (char *)llmcbi_resize(llmcbi_prompt_alloc(p), NULL, 0, n);
    p->n_own = p->own ? (uint16_t)n : 0;
    return p->own || !n;
}

/* The one string that a choice brings, and where; false: it is not one. */
static bool llmcbi_shape_string(llmcbi_shape *s, const llmcbi_wire_choice *c,
                                llmcbi_raw *string)
{
    llmcbi_tool_piece piece;
    llmcbi_json j;

    if ((c->text.len != 0) + (c->reasoning.len != 0) +
            (c->tool_calls.len != 0) >
        1)
        return false;
    s->before = s->behind = 0;
    if (c->tool_calls.len) {
        llmcbi_json_init(&j, c->tool_calls.ptr, c->tool_calls.len);
        llmcbi_json_next(&j);
        if (!llmcbi_wire_next_tool(&j, &piece) || piece.arguments.object ||
            !piece.arguments.ptr)
            return false;
        *string = piece.arguments;
        s->kind = LLMCBI_LIKE_TOOLS;
        s->before = (size_t)(string->ptr - c->tool_calls.ptr);
        s->behind = c->tool_calls.len - s->before - string->len;
    } else if (c->reasoning.len) {
        *string = c->reasoning;
        s->kind = LLMCBI_LIKE_REASONING;
    } else {
        *string = c->text;
        s->kind = LLMCBI_LIKE_TEXT;
    }
    return string->ptr != NULL;
}

/* Remembers an event that brought nothing but one string. That there may be no
 * memory for it does no harm: it only saves time. */
static void llmcbi_prompt_learn(llmcbi_prompt *p, llmcb_str data,
                                const llmcbi_wire_event *ev)
{
    const llmcbi_wire_choice *c = &ev->choice;
    const char *end = data.ptr + data.len, *behind, *padding, *head;
    llmcbi_pattern *q = p->pattern;
    llmcbi_shape s;
    llmcbi_raw string;
    size_t n;

    /* where each event looks different, only now and then */
    if (++p->vain > 16 && p->vain % 16) return;
    if (!ev->has_choice || ev->more || ev->usage.known || c->index != 0 ||
        c->refusal.len || c->finish_reason.len || c->function_call.len ||
        c->logprobs.len || data.len > 1024 || p->sse.skip_lf ||
        memchr(data.ptr, '\n', data.len) ||
        !llmcbi_shape_string(&s, c, &string))
        return;
    behind = string.ptr + string.len;
    padding = llmcbi_prompt_padding(data, behind);
    s.padded = padding != NULL;
    s.head = llmcbi_slice(data.ptr, (size_t)(string.ptr - data.ptr));
    s.mid = llmcbi_slice(behind, (size_t)((padding ? padding : end) - behind));
    s.tail = llmcb_text(padding ? "\"}\n\n" : "\n\n");
    if (!q || !llmcbi_pattern_fits(q, &s)) q = llmcbi_chat_pattern(p->chat, &s);
    if (!q) return;
    head = (const char *)(q + 1) + 6;
    n = s.head.len;
    while (n >= 8 && memcmp(head + n - 8, s.head.ptr + n - 8, 8) == 0)
        n -= 8;
    while (n && head[n - 1] == s.head.ptr[n - 1])
        n--;
    if (!llmcbi_prompt_adopt(p, q, n ? 6 + n : 0)) return;
    if (p->own) {
        memcpy(p->own, "data: ", 6);
        memcpy(p->own + 6, s.head.ptr, n);
    }
    p->alike = true;
}
#else
static bool llmcbi_prompt_same_again(llmcbi_prompt *p, llmcb_str **pieces,
                                     const llmcb_str *stop)
{
    (void)p;
    (void)pieces;
    (void)stop;
    return false;
}

static bool llmcbi_prompt_same_data(llmcbi_prompt *p, llmcb_str data)
{
    (void)p;
    (void)data;
    return false;
}

static void llmcbi_prompt_unlearn(llmcbi_prompt *p)
{
    (void)p;
}

static void llmcbi_prompt_learn(llmcbi_prompt *p, llmcb_str data,
                                const llmcbi_wire_event *ev)
{
    (void)p;
    (void)data;
    (void)ev;
}
#endif

static void llmcbi_prompt_event(llmcbi_prompt *p, llmcb_str data, bool is_error)
{
    llmcbi_wire_event ev;

    p->last_data = p->run.loop->now;
    if (data.len == 6 && memcmp(data.ptr, "[DONE]", 6) == 0) {
        p->sentinel = true;
        llmcbi_prompt_close(
            p, p->got_chunk || p->answer.n ? LLMCB_OK : LLMCB_ETRUNCATED,
            LLMCB_DETAIL_NONE, "the stream held no answer");
        return;
    }
    if (is_error) {
        llmcbi_prompt_api_error(p, data.ptr, data.len);
        return;
    }
    if (llmcbi_prompt_same_data(p, data) ||
        !llmcbi_prompt_read(p, data, false, &ev))
        return;
    llmcbi_prompt_learn(p, data, &ev);
    if (llmcbi_prompt_tell(p, &ev, 0) || p->outcome) return;
    llmcbi_buf_add(llmcbi_prompt_alloc(p), &p->body, data.ptr, data.len);
    if (p->body.failed) llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
}

/* The choices that had to wait. */
static void llmcbi_prompt_event_again(llmcbi_prompt *p)
{
    llmcbi_wire_event ev;
    bool too_deep;

    llmcbi_wire_read(p->body.ptr, p->body.len, &ev, &too_deep);
    if (p->usage_told) ev.usage.known = false;
    if (llmcbi_prompt_tell(p, &ev, p->choices_told) || p->outcome)
        llmcbi_buf_free(llmcbi_prompt_alloc(p), &p->body);
}

static void llmcbi_prompt_stream(llmcbi_prompt *p, llmcb_str *piece,
                                 const llmcb_str *stop)
{
    llmcb_str data;

    while (!p->outcome) {
        const char *at, *end;
        llmcbi_sse_status status;
        while (!piece->len && piece + 1 < stop)
            piece++;
        at = piece->ptr;
        end = at + piece->len;
        if (!llmcbi_run_has_room(&p->run)) {
            llmcbi_prompt_pause(p);
            /* choices wait: the end of a line that is not taken yet holds
             * the exchange, and does nothing when it comes again */
            if (p->body.len && at == end) *piece = llmcbi_slice(at - 1, 1);
            return;
        }
        if (p->body.len) {
            llmcbi_prompt_event_again(p);
            continue;
        }
        if (at == end) return;
        if (p->alike && llmcbi_prompt_same_again(p, &piece, stop)) continue;
        p->alike = false;
        status =
            llmcbi_sse_next(llmcbi_prompt_alloc(p), &p->sse, &at, end, &data);
        *piece = llmcbi_slice(at, (size_t)(end - at));
        if (status == LLMCBI_SSE_EVENT)
            llmcbi_prompt_event(p, data, p->sse.is_error);
        else if (status == LLMCBI_SSE_LIMIT)
            llmcbi_prompt_fail(p, LLMCB_ELIMIT,
                               "an event exceeds limits.event");
        else if (status != LLMCBI_SSE_MORE)
            llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
    }
    for (; piece < stop; piece++)
        piece->len = 0; /* nobody wants it any more */
}

/* -- answers that are no stream */

/* A whole completion; told as one token a choice where a stream was asked
 * for. */
static void llmcbi_prompt_whole(llmcbi_prompt *p, bool cut)
{
    llmcbi_wire_event ev;

    if (!llmcbi_prompt_read(p, llmcbi_buf_str(&p->body), cut || !p->body.len,
                            &ev))
        return;
    /* a completion of legal size goes into an empty log in one go */
    if (!llmcbi_prompt_tell(p, &ev, 0))
        while (!p->outcome && p->body.len)
            llmcbi_prompt_event_again(p);
    llmcbi_prompt_close(p, p->got_chunk ? LLMCB_OK : LLMCB_EPROTO,
                        LLMCB_DETAIL_NONE,
                        "the answer is JSON, but no completion");
}

static void llmcbi_prompt_http_error(llmcbi_prompt *p)
{
    llmcb_error e;
    char digits[24];
    const char *text;

    llmcbi_error_set(&e, LLMCB_EHTTP, "HTTP status ");
    text = llmcbi_decimal(digits, p->status);
    llmcbi_error_add(&e, text, strlen(text));
    e.http_status = p->status;
    if (p->body.len) llmcbi_wire_error(&e, p->body.ptr, p->body.len);
    llmcbi_prompt_decide(p, &e);
}

/* Where a redirect points to, but for its path and query. */
static void llmcbi_prompt_redirect(llmcbi_prompt *p)
{
    llmcb_error e;
    llmcbi_url u;

    llmcbi_error_set(&e, LLMCB_EREDIRECT, NULL);
    e.http_status = p->status;
    if (p->body.len && !llmcbi_url_parse(&u, p->body.ptr) && !u.unix_path.len) {
        llmcbi_error_add(&e, ": ", 2);
        llmcbi_error_add(&e, p->body.ptr,
                         (size_t)(u.authority.ptr - p->body.ptr) +
                             u.authority.len);
    }
    llmcbi_prompt_decide(p, &e);
}

/* A status that is no success. */
static void llmcbi_prompt_refused(llmcbi_prompt *p)
{
    if (p->status >= 300 && p->status < 400)
        llmcbi_prompt_redirect(p);
    else
        llmcbi_prompt_http_error(p);
}

static void llmcbi_prompt_gather(llmcbi_prompt *p, const llmcb_str *piece,
                                 size_t most)
{
    size_t room = most - p->body.len;

    llmcbi_buf_add(llmcbi_prompt_alloc(p), &p->body, piece->ptr,
                   piece->len < room ? piece->len : room);
    if (p->body.failed) llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
}

/* -- the request */

static void llmcbi_prompt_forget_asked(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    llmcbi_asked *q = p->asked;

    if (!q) return;
    llmcbi_buf_free(a, &q->body);
    llmcbi_free(a, q, sizeof *q + q->request.n_headers * sizeof(llmcb_pair));
    p->asked = NULL;
}

/* It may be long, and the answer slow: it goes when neither the transport,
 * another attempt nor a cache can want it. */
LLMCBI_APART static void llmcbi_prompt_is_asked(llmcbi_prompt *p)
{
    if (p->sent && p->got_body && !p->chat->d.cache)
        llmcbi_prompt_forget_asked(p);
}

/* -- what the exchange tells */

static void llmcbi_prompt_connected(void *owner)
{
    llmcbi_prompt *p = (llmcbi_prompt *)owner;

    if (p->phase == LLMCBI_PHASE_CONNECT)
        llmcbi_prompt_set_phase(p, LLMCBI_PHASE_FIRST_BYTE,
                                p->chat->d.first_byte_ms);
}

static void llmcbi_prompt_again(void *owner)
{
    llmcbi_prompt *p = (llmcbi_prompt *)owner;

    if (p->phase == LLMCBI_PHASE_FIRST_BYTE)
        llmcbi_prompt_set_phase(p, LLMCBI_PHASE_CONNECT, p->chat->d.connect_ms);
}

static void llmcbi_prompt_sent(void *owner)
{
    llmcbi_prompt *p = (llmcbi_prompt *)owner;

    p->sent = true;
    llmcbi_prompt_is_asked(p);
}

static void llmcbi_prompt_status(void *owner, int status)
{
    llmcbi_prompt *p = (llmcbi_prompt *)owner;

    llmcbi_prompt_connected(p); /* a transport that did not say */
    p->status = status;
    p->body_kind =
        status >= 200 && status < 300 ? LLMCBI_BODY_UNKNOWN : LLMCBI_BODY_ERROR;
}

LLMCBI_APART static int64_t llmcbi_wall_ms(void)
{
    struct timespec ts;

    LLMCBI_SYS(clock_gettime)(CLOCK_REALTIME, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Empty: none. */
static void llmcbi_prompt_set_id(llmcbi_prompt *p, llmcb_str id)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);

    llmcbi_str_free(a, p->request_id);
    p->request_id = llmcbi_slice("", 0);
    if (id.len >= sizeof((llmcb_error *)NULL)->request_id)
        id.len = sizeof((llmcb_error *)NULL)->request_id - 1;
    llmcbi_str_keep(a, &p->request_id, id);
}

static void llmcbi_prompt_header(void *owner, llmcb_str name, llmcb_str value)
{
    static const char *const names[] = { "content-type",   "content-encoding",
                                         "x-should-retry", "retry-after-ms",
                                         "retry-after",    "x-request-id",
                                         "location" };
    llmcbi_prompt *p = (llmcbi_prompt *)owner;
    unsigned which;
    int64_t ms;

    for (which = 0; which < 7 && !llmcbi_str_is_nocase(name, names[which]);)
        which++;
    switch (which) {
    case 0:
        p->html = value.len >= 9 &&
                  llmcbi_str_is_nocase(llmcbi_slice(value.ptr, 9), "text/html");
        break;
    case 1:
        p->encoded = value.len && !llmcbi_str_is_nocase(value, "identity");
        break;
    case 2:
        if (llmcbi_str_is_nocase(value, "true")) p->should_retry = 1;
        if (llmcbi_str_is_nocase(value, "false")) p->should_retry = 0;
        break;
    case 3:
        ms = llmcbi_parse_seconds(value, 1);
        if (ms >= 0) p->retry_after = ms;
        break;
    case 4:
        if (p->retry_after < 0)
            p->retry_after = llmcbi_retry_after(value, llmcbi_wall_ms());
        break;
    case 5: llmcbi_prompt_set_id(p, value); break;
    case 6:
        if (p->status < 300 || p->status >= 400 || value.len >= 4096) break;
        p->body.len = 0;
        llmcbi_buf_add(llmcbi_prompt_alloc(p), &p->body, value.ptr, value.len);
        break;
    default: break;
    }
}

/* The first byte of a success tells what it is, whatever the head says:
 * servers label both kinds wrongly. */
static void llmcbi_prompt_sniff(llmcbi_prompt *p, llmcb_str *piece)
{
    if (p->encoded || p->html) {
        llmcbi_prompt_fail(p, LLMCB_ECTYPE,
                           p->encoded ? "the answer is compressed, which was "
                                        "not asked for"
                                      : "the answer is an HTML page");
        return;
    }
    while (piece->len && (*piece->ptr == ' ' || *piece->ptr == '\t' ||
                          *piece->ptr == '\r' || *piece->ptr == '\n'))
        *piece = llmcbi_slice(piece->ptr + 1, piece->len - 1);
    if (!piece->len) return;
    if (*piece->ptr == '<')
        llmcbi_prompt_fail(p, LLMCB_ECTYPE, "the answer is a page of markup");
    p->body_kind = *piece->ptr == '{' ? LLMCBI_BODY_JSON : LLMCBI_BODY_STREAM;
}

static void llmcbi_prompt_data(void *owner, llmcb_str *piece, size_t n)
{
    llmcbi_prompt *p = (llmcbi_prompt *)owner;
    const llmcb_limits *limits = &p->chat->d.limits;
    const llmcb_str *stop = piece + n;

    /* what is found from here */
    LLMCBI_FETCH(p->run.cursors);
    LLMCBI_FETCH(p->own);
    LLMCBI_FETCH(p->answer.choices);
    if (!n && !p->outcome && !p->over) llmcbi_prompt_pause(p);
    for (; piece < stop; piece->len = 0, piece++) {
        if (p->outcome || p->over) continue; /* nobody listens any more */
        if (p->phase == LLMCBI_PHASE_FIRST_BYTE)
            llmcbi_prompt_set_phase(p, LLMCBI_PHASE_IDLE, p->chat->d.idle_ms);
        if (p->body_kind == LLMCBI_BODY_ERROR) {
            if (p->status >= 300 && p->status < 400) continue;
            p->last_data = p->run.loop->now;
            llmcbi_prompt_gather(p, piece, limits->error_body);
            if (!p->outcome && p->body.len == limits->error_body)
                llmcbi_prompt_http_error(p);
            continue;
        }
        p->got_body = true;
        if (p->body_kind == LLMCBI_BODY_UNKNOWN) {
            llmcbi_prompt_is_asked(p);
            llmcbi_prompt_sniff(p, piece);
        }
        if (p->outcome) continue;
        if (p->body_kind == LLMCBI_BODY_JSON) {
            p->last_data = p->run.loop->now;
            llmcbi_prompt_gather(p, piece, limits->body);
        } else if (p->body_kind == LLMCBI_BODY_STREAM) {
            p->run.loop->telling = true;
            llmcbi_prompt_stream(p, piece, stop);
            p->run.loop->telling = false;
            return;
        }
    }
}

static bool llmcbi_prompt_all_finished(const llmcbi_prompt *p)
{
    size_t i, want = (size_t)p->chat->d.n;

    if (p->answer.n < want) return false;
    for (i = 0; i < p->answer.n; i++)
        if (!p->answer.choices[i].finished) return false;
    return true;
}

static void llmcbi_prompt_end(void *owner, llmcb_ending ending,
                              const llmcb_error *error)
{
    llmcbi_prompt *p = (llmcbi_prompt *)owner;
    bool was_over = p->over || p->outcome;

    p->orderly = ending == LLMCB_ORDERLY;
    p->over = true;
    if (was_over) return;
    /* a status that is no success stands, however its words end */
    if (ending == LLMCB_BROKEN &&
        (p->body_kind != LLMCBI_BODY_ERROR || error->code == LLMCB_ENOMEM)) {
        llmcb_error e = *error;
        if (e.code == LLMCB_ETIMEDOUT) e.detail = LLMCB_DETAIL_CONNECT;
        llmcbi_prompt_decide(p, &e);
        return;
    }
    if (p->body_kind == LLMCBI_BODY_ERROR) {
        llmcbi_prompt_refused(p);
        return;
    }
    if (p->body_kind == LLMCBI_BODY_JSON) {
        llmcbi_prompt_whole(p, ending != LLMCB_ORDERLY);
        return;
    }
    if (p->body_kind == LLMCBI_BODY_UNKNOWN && (p->html || p->encoded)) {
        llmcbi_prompt_fail(p, LLMCB_ECTYPE, NULL);
        return;
    }
    /* without [DONE] it takes a finish reason of every choice */
    llmcbi_prompt_close(
        p, llmcbi_prompt_all_finished(p) ? LLMCB_OK : LLMCB_ETRUNCATED,
        LLMCB_DETAIL_NONE, NULL);
}

/* What listens to the exchanges of all prompts. */
static const llmcbi_sink llmcbi_prompt_sink = {
    llmcbi_prompt_connected, llmcbi_prompt_sent,
    llmcbi_prompt_status,    llmcbi_prompt_header,
    llmcbi_prompt_data,      llmcbi_prompt_end,
    llmcbi_prompt_again,     offsetof(llmcbi_prompt, run.lockstep)
};

/* -- attempts */

static void llmcbi_prompt_let_go(llmcbi_prompt *p)
{
    bool read_out = p->orderly || p->sentinel;

    if (!p->x || !p->x->tr) return;
    llmcbi_exchange_close(p->x,
                          read_out ? LLMCBI_PART_RELEASE : LLMCBI_PART_CANCEL);
    llmcbi_sse_free(llmcbi_prompt_alloc(p), &p->sse);
    llmcbi_buf_free(llmcbi_prompt_alloc(p), &p->body);
    llmcbi_prompt_unlearn(p);
    p->over = false;
}

/* One that a chat does not name is the same for all chats of a loop. */
static llmcb_transport *llmcbi_chat_transport(const llmcb_chat *chat)
{
    llmcb_loop *loop = chat->loop;

    if (chat->d.transport) return chat->d.transport;
    if (!loop->default_transport)
        loop->default_transport = llmcb_curl_transport(loop);
    if (!loop->default_transport)
        loop->default_transport = llmcb_socket_transport(loop);
    return loop->default_transport;
}

static void llmcbi_prompt_launch(llmcbi_prompt *p)
{
    llmcb_chat *chat = p->chat;
    llmcb_transport *tr = llmcbi_chat_transport(chat);
    llmcb_code code;

    p->attempt++;
    p->over = p->orderly = p->html = p->encoded = p->sent = false;
    p->status = 0;
    p->retry_after = LLMCBI_NO_WISH;
    p->should_retry = -1;
    p->body_kind = LLMCBI_BODY_UNKNOWN;
    llmcbi_prompt_set_id(p, llmcbi_slice("", 0));
    p->sse.limit = chat->d.limits.event;
    llmcbi_exchange_open(p->x, tr, &llmcbi_prompt_sink, p);
    llmcbi_prompt_set_phase(p, LLMCBI_PHASE_CONNECT, chat->d.connect_ms);
    code = tr->start(tr, p->x, &p->asked->request);
    if (code == LLMCB_OK) return;
    llmcbi_exchange_close(p->x, LLMCBI_PART_UNSTARTED);
    llmcbi_prompt_fail(p, code, NULL);
}

#ifndef LLMCB_NO_KIT
/* Waits for a token of the limiter, behind the others. */
static void llmcbi_prompt_limit(llmcbi_prompt *p)
{
    llmcb_limiter *l = p->chat->d.limiter;
    int64_t ms = l->first ? 1 : llmcbi_limiter_take(l);

    if (!ms) {
        llmcbi_prompt_launch(p);
        return;
    }
    p->limited = true;
    if (!l->first) llmcbi_timer_start(l->loop, &l->timer, ms);
    *l->last = p;
    l->last = &p->next_limited;
}

static void llmcbi_prompt_unlimit(llmcbi_prompt *p)
{
    llmcb_limiter *l = p->chat->d.limiter;
    llmcbi_prompt **at = &l->first;

    while (*at != p)
        at = &(*at)->next_limited;
    *at = p->next_limited;
    if (!*at) l->last = at;
    p->limited = false;
    p->next_limited = NULL;
    if (!l->first) llmcbi_timer_stop(l->loop, &l->timer);
}

static void llmcbi_limiter_timer(llmcbi_timer *t)
{
    llmcb_limiter *l = LLMCBI_OWNER(llmcb_limiter, timer, t);
    int64_t ms = 0;

    while (l->first && (ms = llmcbi_limiter_take(l)) == 0) {
        llmcbi_prompt *p = l->first;
        llmcbi_prompt_unlimit(p);
        llmcbi_prompt_launch(p);
    }
    if (l->first) llmcbi_timer_start(l->loop, &l->timer, ms);
}

/* What an answer is kept by: the address and the request. */
static void llmcbi_prompt_key(const llmcbi_prompt *p, llmcbi_buf *key)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);

    memset(key, 0, sizeof *key);
    llmcbi_buf_text(a, key, p->asked->request.url);
    llmcbi_buf_text(a, key, "\n");
    llmcbi_buf_add(a, key, p->asked->body.ptr, p->asked->body.len);
}

/* Whether the cache has the answer; then the outcome is known. */
static bool llmcbi_prompt_cached(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    const llmcb_cache *cache = p->chat->d.cache;
    const llmcbi_kept *kept = NULL;
    llmcbi_buf key;

    if (!cache || p->call->pull) return false;
    llmcbi_prompt_key(p, &key);
    if (!key.failed) kept = llmcbi_cache_find(cache, llmcbi_buf_str(&key));
    llmcbi_buf_free(a, &key);
    if (!kept) return false;
    llmcbi_buf_add(a, &p->body, (const char *)(kept + 1) + kept->key_len,
                   kept->len);
    p->cached = p->answer.result.cached = true;
    if (p->body.failed)
        llmcbi_prompt_fail(p, LLMCB_ENOMEM, NULL);
    else
        llmcbi_prompt_whole(p, false);
    llmcbi_buf_free(a, &p->body);
    return true;
}

static void llmcbi_prompt_keep_answer(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    const llmcb_result *r = &p->answer.result;
    llmcbi_buf key, answer;
    size_t i;

    if (!p->chat->d.cache || p->call->pull || p->cached) return;
    for (i = 0; i < r->n_generations; i++)
        if (r->generations[i].logprobs.len) return;
    llmcbi_prompt_key(p, &key);
    memset(&answer, 0, sizeof answer);
    llmcbi_wire_result(a, &answer, r);
    if (!key.failed && !answer.failed)
        llmcbi_cache_keep(p->chat->d.cache, llmcbi_buf_str(&key),
                          llmcbi_buf_str(&answer));
    llmcbi_buf_free(a, &key);
    llmcbi_buf_free(a, &answer);
}
#endif /* LLMCB_NO_KIT */

/* The first attempt, if one is needed. */
static void llmcbi_prompt_go(llmcbi_prompt *p)
{
    const llmcb_chat *chat = p->chat;

    p->launched = true;
#ifndef LLMCB_NO_KIT
    if (llmcbi_prompt_cached(p)) return;
#endif
    if (chat->d.total_ms > 0) {
        p->total_due = p->run.loop->now + chat->d.total_ms;
        llmcbi_prompt_arm(p);
    }
#ifndef LLMCB_NO_KIT
    if (chat->d.limiter) {
        llmcbi_prompt_limit(p);
        return;
    }
#endif
    llmcbi_prompt_launch(p);
}

static bool llmcbi_prompt_retryable(const llmcbi_prompt *p,
                                    const llmcb_error *e)
{
    if (p->got_body || p->attempt > p->chat->d.max_retries) return false;
    if (e->retry_after_ms > LLMCBI_RETRY_CAP) return false;
    switch (e->code) {
    case LLMCB_EHTTP:
        return p->should_retry >= 0 ? p->should_retry > 0
                                    : llmcbi_status_retryable(e->http_status);
    case LLMCB_ETIMEDOUT:
        return e->detail == LLMCB_DETAIL_CONNECT ||
               e->detail == LLMCB_DETAIL_FIRST_BYTE;
    case LLMCB_ECONNECT:
    case LLMCB_EDNS:
    case LLMCB_EIO: return true;
    default: return false;
    }
}

typedef struct llmcbi_retry_record {
    llmcb_retry retry;
    llmcb_error error;
} llmcbi_retry_record;

/* Instead of an outcome: an on_retry event and another try after a while. */
static bool llmcbi_prompt_retry(llmcbi_prompt *p, const llmcb_error *e)
{
    llmcbi_retry_record *rec;
    int64_t ms = e->retry_after_ms;

    if (p->run.state != LLMCBI_RUN_OPEN || !llmcbi_prompt_retryable(p, e))
        return false;
    if (ms < 0) ms = llmcbi_backoff(&p->run.loop->random, p->attempt);
    rec =
        (llmcbi_retry_record *)(void *)llmcbi_run_reserve(&p->run, sizeof *rec);
    if (!rec) return false;
    rec->error = *e;
    rec->retry.attempt = p->attempt;
    rec->retry.delay_ms = ms;
    rec->retry.error = &rec->error;
    llmcbi_run_commit(&p->run, LLMCB_RETRY, sizeof *rec);
    p->over = true;
    llmcbi_prompt_set_phase(p, LLMCBI_PHASE_BACKOFF, ms);
    llmcbi_make_ready(p->run.loop, &p->call->ready);
    return true;
}

static void llmcbi_prompt_timer(llmcbi_timer *t)
{
    llmcbi_prompt *p = LLMCBI_OWNER(llmcbi_prompt, timer, t);
    static const char *const why[] = { NULL, "no connection within connect_ms",
                                       "no answer within first_byte_ms",
                                       "no data within idle_ms" };
    const llmcb_chat_desc *d = &p->chat->d;
    int64_t now = p->run.loop->now;

    if (p->total_due && p->total_due <= now) {
        llmcbi_prompt_close(p, LLMCB_ETIMEDOUT, LLMCB_DETAIL_TOTAL,
                            "the call took longer than total_ms");
        return;
    }
    if (p->phase == LLMCBI_PHASE_IDLE && p->last_data + d->idle_ms > now) {
        p->phase_due = p->last_data + d->idle_ms; /* moved since */
        llmcbi_prompt_arm(p);
        return;
    }
    if (p->phase == LLMCBI_PHASE_BACKOFF) {
        llmcbi_prompt_let_go(p);
        llmcbi_prompt_launch(p);
    } else if (p->body_kind == LLMCBI_BODY_ERROR) {
        llmcbi_prompt_refused(p);
    } else {
        llmcbi_prompt_close(p, LLMCB_ETIMEDOUT, (llmcb_detail)p->phase,
                            why[p->phase]);
    }
}

/* -- the call as a whole */

/* A handler failed, or was given up: the run's outcome changes, unless its
 * finish is being told already. */
static void llmcbi_prompt_handler_trouble(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    llmcb_error e;

    if (!llmcbi_run_trouble(&p->run, &e)) return;
    if (p->run.state >= LLMCBI_RUN_DRAINED) {
        if (p->call->late) return;
        llmcbi_prompt_complete_error(p, &e);
        p->call->late = llmcbi_error_keep(a, &e);
    } else if (llmcbi_outcome_replaced(a, &p->outcome, &e)) {
        llmcbi_prompt_decide(p, &e);
    }
}

/* Chunks follow the handlers. */
static bool llmcbi_call_chunk_ready(const llmcbi_call *c)
{
    const llmcbi_run *run = &c->prompts[0].run;
    const llmcbi_reader *r = run->reader;
    uint64_t end;

    if (!r) return false;
    end = run->skipping ? r->end : run->slowest;
    if (run->finish_seq && end >= run->finish_seq) end = run->finish_seq - 1;
    return r->seq + (r->shown ? 1 : 0) < end;
}

/* From the pump: what it has brought about. */
static void llmcbi_prompt_told(llmcbi_run *run)
{
    llmcbi_prompt *p = llmcbi_prompt_of(run);
    llmcbi_call *c = p->call;

    if (run->reader && c->op.reader && llmcbi_call_chunk_ready(c))
        llmcbi_task_wake(c->op.reader, LLMCB_OK);
    llmcbi_prompt_handler_trouble(p);
    if (run->starved && !p->over) {
        uint64_t held = run->head - llmcbi_run_window(run);
        if ((run->lockstep || held <= run->rules->window_events / 2) &&
            llmcbi_run_has_room(run)) {
            llmcbi_prompt_unpause(p);
            llmcbi_exchange_resume(p->x);
        }
    }
    if (run->state != LLMCBI_RUN_OPEN || p->over)
        llmcbi_make_ready(c->op.loop, &c->ready);
}

static void llmcbi_prompt_forget_talk(llmcbi_prompt *p)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    llmcbi_talk *talk = (llmcbi_talk *)llmcbi_unconst(p->run.start);

    if (!talk) return;
    llmcbi_arena_free(a, &talk->arena);
    llmcbi_free(a, talk, sizeof *talk);
    p->run.start = NULL;
}

/* A barrier: all start events are done, then the requests go out. */
static void llmcbi_call_open(llmcbi_call *c)
{
    const llmcb_error *raised = NULL;
    size_t i;

    for (i = 0; i < c->n; i++) {
        const llmcbi_prompt *p = &c->prompts[i];
        if (p->run.state == LLMCBI_RUN_STARTING && !llmcbi_run_settled(&p->run))
            return;
        if (p->outcome && p->outcome->code == LLMCB_EHANDLER && !p->attempt)
            raised = p->outcome;
    }
    for (i = 0; i < c->n; i++) {
        llmcbi_prompt *p = &c->prompts[i];
        if (p->run.state == LLMCBI_RUN_STARTING) {
            if (raised) { /* in a start: nothing is sent */
                llmcb_error e = *raised;
                llmcbi_prompt_decide(p, &e);
            } else {
                llmcbi_run_set_state(&p->run, LLMCBI_RUN_OPEN);
            }
        }
        if (p->run.slowest && !p->run.gave_up) llmcbi_prompt_forget_talk(p);
    }
}

/* Requests, as many at a time as may be open. */
static void llmcbi_call_launch(llmcbi_call *c)
{
    size_t i, open = 0;

    for (i = 0; i < c->n; i++)
        if (c->prompts[i].launched && !c->prompts[i].outcome) open++;
    for (i = 0; i < c->n && open < c->max_open; i++) {
        llmcbi_prompt *p = &c->prompts[i];
        if (p->run.state != LLMCBI_RUN_OPEN || p->launched || p->outcome)
            continue;
        llmcbi_prompt_go(p);
        open++;
    }
}

static void llmcbi_prompt_tell_finish(llmcbi_prompt *p)
{
    bool ok = p->outcome->code == LLMCB_OK;

    p->answer.result.sentinel = p->sentinel;
    llmcbi_answer_show(&p->answer, ok);
#ifndef LLMCB_NO_KIT
    if (ok) llmcbi_prompt_keep_answer(p);
#endif
    llmcbi_prompt_forget_asked(p); /* the exchange is gone */
    llmcbi_run_finish(&p->run, &p->answer.result, NULL, p->outcome);
}

/* Tells the outcome of a run that has drained. true: that is done. */
static bool llmcbi_prompt_finish(llmcbi_prompt *p)
{
    if (p->run.state == LLMCBI_RUN_DRAINED) llmcbi_prompt_tell_finish(p);
    if (p->run.state == LLMCBI_RUN_FINISHING && llmcbi_run_settled(&p->run))
        llmcbi_run_set_state(&p->run, LLMCBI_RUN_DONE);
    return p->run.state == LLMCBI_RUN_DONE;
}

/* When all runs have drained: errors one by one in index order, then the
 * ends. true: all are told and done. */
static bool llmcbi_call_finish(llmcbi_call *c)
{
    size_t i;
    bool done = true;

    for (; c->told < c->n; c->told++) {
        llmcbi_prompt *p = &c->prompts[c->told];
        if (p->outcome->code != LLMCB_OK && !llmcbi_prompt_finish(p))
            return false;
    }
    for (i = 0; i < c->n; i++)
        if (!llmcbi_prompt_finish(&c->prompts[i])) done = false;
    return done;
}

/* The error of the op: a copy, since the prompts keep theirs. */
static const llmcb_error *llmcbi_call_error(llmcbi_call *c)
{
    const llmcb_allocator *a = &c->op.loop->alloc;
    const llmcb_error *e = NULL;
    llmcb_error cancelled;
    size_t i;

    for (i = 0; i < c->n && !e; i++)
        if (c->prompts[i].outcome->code != LLMCB_OK) e = c->prompts[i].outcome;
    if (!e && !c->late && c->cancelled) {
        llmcbi_error_set(&cancelled, LLMCB_ECANCELLED, NULL);
        cancelled.detail = LLMCB_DETAIL_CALLER;
        e = &cancelled;
    }
    return llmcbi_outcome_error(a, e ? e : llmcbi_error_const(LLMCB_OK),
                                c->late);
}

static void llmcbi_call_free(llmcbi_call *c);

static void llmcbi_call_step(llmcbi_ready *r)
{
    llmcbi_call *c = LLMCBI_OWNER(llmcbi_call, ready, r);
    bool drained = true;
    size_t i;

    if (c->orphaned) {
        llmcbi_call_free(c);
        return;
    }
    if (c->op.done) return;
    for (i = 0; i < c->n; i++)
        if (c->prompts[i].over) llmcbi_prompt_let_go(&c->prompts[i]);
    llmcbi_call_open(c);
    llmcbi_call_launch(c);
    for (i = 0; i < c->n; i++) {
        llmcbi_run *run = &c->prompts[i].run;
        if (run->state == LLMCBI_RUN_DRAINING && llmcbi_run_settled(run))
            llmcbi_run_set_state(run, LLMCBI_RUN_DRAINED);
        if (run->state < LLMCBI_RUN_DRAINED) drained = false;
    }
    if (drained && llmcbi_call_finish(c))
        llmcbi_op_finish(&c->op, llmcbi_call_error(c));
}

static void llmcbi_call_cancel(llmcb_op *op, llmcb_detail detail)
{
    llmcbi_call *c = (llmcbi_call *)(void *)op;
    size_t i;

    if (!c->cancelled) c->cancelled = detail == LLMCB_DETAIL_CALLER;
    for (i = 0; i < c->n; i++) {
        llmcbi_prompt *p = &c->prompts[i];
        if (p->run.state >= LLMCBI_RUN_DRAINED || p->run.skipping) {
            if (detail == LLMCB_DETAIL_LOOP) llmcbi_run_interrupt(&p->run);
            continue;
        }
        if (p->outcome && p->outcome->code == LLMCB_OK) {
            llmcbi_error_drop(llmcbi_prompt_alloc(p), p->outcome);
            p->outcome = NULL;
        }
        llmcbi_prompt_close(p, LLMCB_ECANCELLED, detail, NULL);
        llmcbi_run_skip(&p->run);
        /* not for what is ending: freeing a loop asks in each turn */
        llmcbi_make_ready(op->loop, &c->ready);
    }
}

static void llmcbi_call_begin(llmcb_op *op)
{
    llmcbi_call *c = (llmcbi_call *)(void *)op;
    size_t i;

    for (i = 0; i < c->n; i++)
        llmcbi_run_release(&c->prompts[i].run);
}

static void llmcbi_call_waited(llmcb_op *op)
{
    llmcbi_call *c = (llmcbi_call *)(void *)op;

    if (!c->n || !c->prompts[0].run.reader) return;
    c->prompts[0].run.reader = NULL; /* unread chunks go */
    llmcbi_run_wake(&c->prompts[0].run);
}

static void llmcbi_call_free(llmcbi_call *c)
{
    llmcb_loop *loop = c->op.loop;
    const llmcb_allocator *a = &loop->alloc;
    size_t i;

    for (i = 0; i < c->n; i++)
        if (llmcbi_run_in_use(&c->prompts[i].run)) {
            c->orphaned = true; /* later */
            return;
        }
    for (i = 0; i < c->n; i++) {
        llmcbi_prompt *p = &c->prompts[i];
        p->over = true;
        llmcbi_prompt_let_go(p);
        llmcbi_timer_free(loop, &p->timer);
        llmcbi_prompt_forget_asked(p);
        llmcbi_prompt_forget_talk(p);
        llmcbi_prompt_set_id(p, llmcbi_slice("", 0));
        llmcbi_answer_free(a, &p->answer);
        llmcbi_error_drop(a, p->outcome);
        llmcbi_run_free(&p->run);
    }
    llmcbi_unready(&c->ready);
    llmcbi_error_drop(a, c->late);
    llmcbi_arena_free(a, &c->arena);
    if (c->chat) llmcbi_chat_unref(c->chat);
    llmcbi_free(a, c, sizeof *c);
}

static void llmcbi_call_destroy(llmcb_op *op)
{
    llmcbi_call_free((llmcbi_call *)(void *)op);
}

static const llmcbi_op_kind llmcbi_call_kind = { llmcbi_call_cancel,
                                                 llmcbi_call_destroy,
                                                 llmcbi_call_waited,
                                                 llmcbi_call_begin, NULL };

/* -- making a call */

/* A copy of a message, with content_len set. */
static void llmcbi_message_copy(const llmcb_allocator *a, llmcbi_arena *arena,
                                llmcb_message *to, const llmcb_message *from)
{
    llmcb_tool_call *calls;
    size_t i;

    *to = *from;
    if (!to->content)
        to->content_len = 0;
    else if (!to->content_len)
        to->content_len = strlen(to->content);
    to->content = llmcbi_arena_text(a, arena, to->content ? to->content : "",
                                    to->content_len);
    to->name = llmcbi_arena_copy(a, arena, from->name);
    to->tool_call_id = llmcbi_arena_copy(a, arena, from->tool_call_id);
    to->parts = llmcbi_arena_copy(a, arena, from->parts);
    if (!to->n_tool_calls) return;
    calls = (llmcb_tool_call *)llmcbi_arena_get(
        a, arena, to->n_tool_calls * sizeof *calls);
    to->tool_calls = calls;
    for (i = 0; calls && i < to->n_tool_calls; i++) {
        const llmcb_tool_call *call = &from->tool_calls[i];
        calls[i].id = llmcbi_arena_str(a, arena, call->id);
        calls[i].name = llmcbi_arena_str(a, arena, call->name);
        calls[i].arguments = llmcbi_arena_str(a, arena, call->arguments);
        calls[i].valid = call->valid;
    }
}

/* What the runs of a call are made from. */
typedef struct llmcbi_plan {
    const llmcb_config *config;
    llmcbi_setup setup;
    llmcbi_buf params; /* the request but for its messages */
    size_t batch, exchange_size;
    bool stream; /* the requests ask for one */
} llmcbi_plan;

/* Bytes that most conversations take: each text twice. */
static size_t llmcbi_talk_room(const llmcb_prompt *prompt,
                               const llmcbi_plan *plan)
{
    size_t i, size = LLMCBI_ALIGN(plan->params.len + 1) + 16;

    for (i = 0; i < prompt->n; i++) {
        const llmcb_message *m = &prompt->messages[i];
        size_t len = m->content ? m->content_len : 0;
        if (!len && m->content) len = strlen(m->content);
        size += sizeof *m + 2 * LLMCBI_ALIGN(len + 12);
    }
    return size;
}

/* What the start event shows, with a copy of the conversation. */
LLMCBI_APART static bool llmcbi_prompt_copy_talk(llmcbi_prompt *p,
                                                 const llmcb_prompt *prompt,
                                                 const llmcbi_plan *plan)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    llmcbi_talk *talk = (llmcbi_talk *)llmcbi_alloc(a, sizeof *talk);
    llmcb_start *start;
    llmcbi_arena *arena;
    llmcb_message *m;
    llmcbi_buf text;
    size_t i;

    if (!talk) return false;
    start = &talk->start;
    p->run.start = start;
    arena = &talk->arena;
    llmcbi_arena_room(a, arena, llmcbi_talk_room(prompt, plan));
    m = (llmcb_message *)llmcbi_arena_get(a, arena, prompt->n * sizeof *m);
    for (i = 0; m && i < prompt->n; i++)
        llmcbi_message_copy(a, arena, &m[i], &prompt->messages[i]);
    if (!m || arena->failed) return false;
    memset(&text, 0, sizeof text);
    llmcbi_wire_prompt(a, &text, m, prompt->n);
    start->prompt = llmcbi_arena_str(a, arena, llmcbi_buf_str(&text));
    if (text.failed) arena->failed = true;
    llmcbi_buf_free(a, &text);
    start->messages = m;
    start->n_messages = prompt->n;
    start->model = p->chat->d.model;
    start->batch_size = plan->batch;
    start->params = llmcbi_arena_str(a, arena, llmcbi_buf_str(&plan->params));
    start->description = "";
    start->input = start->tool_call_id = llmcbi_slice("", 0);
    return !arena->failed;
}

static bool llmcbi_prompt_ask(llmcbi_prompt *p, const llmcb_prompt *prompt,
                              const llmcbi_plan *plan)
{
    const llmcb_allocator *a = llmcbi_prompt_alloc(p);
    const llmcb_chat *chat = p->chat;
    size_t i, n = chat->n_headers + 1;
    llmcbi_asked *asked =
        (llmcbi_asked *)llmcbi_alloc(a, sizeof *asked + n * sizeof(llmcb_pair));
    llmcb_pair *headers;
    llmcb_request *q;

    if (!asked) return false;
    p->asked = asked;
    q = &asked->request;
    headers = (llmcb_pair *)(void *)(asked + 1);
    q->n_headers = n;
    for (i = 0; i + 1 < n; i++)
        headers[i] = chat->headers[i];
    headers[i].key = "Idempotency-Key"; /* equal for all attempts */
    headers[i].value = p->run.pub.id;
    llmcbi_wire_body(a, &asked->body, prompt->messages, prompt->n,
                     llmcbi_buf_str(&plan->params),
                     llmcbi_has_member(plan->config->extra, "messages")
                         ? plan->config->extra
                         : chat->d.extra);
    llmcbi_buf_trim(a, &asked->body);
    q->method = "POST";
    q->url = chat->url;
    q->headers = headers;
    q->body = asked->body.ptr;
    q->body_len = asked->body.len;
    q->connect_ms = chat->d.connect_ms;
    q->identity = chat->identity;
    q->ca_file = chat->d.ca_file;
    q->limits = &chat->d.limits;
    q->http2 = chat->d.http2;
    q->insecure_tls = chat->d.insecure_tls;
    return !asked->body.failed;
}

LLMCBI_APART static llmcb_code llmcbi_prompt_init(llmcbi_prompt *p,
                                                  llmcbi_call *c,
                                                  const llmcb_prompt *prompt,
                                                  const llmcbi_plan *plan)
{
    llmcb_loop *loop = c->op.loop;
    llmcb_chat *chat = c->chat;
    const llmcbi_setup *setup = &plan->setup;
    llmcb_code code;

    p->call = c;
    p->chat = chat;
    p->stream = plan->stream;
    p->answer.result = *llmcbi_no_result();
    p->retry_after = LLMCBI_NO_WISH;
    p->run.rules = &chat->rules;
    code = llmcbi_run_init(loop, &p->run, &c->arena, setup->handlers,
                           setup->n_handlers, &c->op);
    if (code != LLMCB_OK) return code;
    p->x = (llmcb_exchange *)llmcbi_arena_get(&loop->alloc, &c->arena,
                                              plan->exchange_size);
    if (!p->x || !llmcbi_timer_init(loop, &p->timer, llmcbi_prompt_timer))
        return LLMCB_ENOMEM;
    llmcbi_run_name(&p->run, &c->arena, plan->config, setup, "ChatOpenAI");
    if (!llmcbi_prompt_ask(p, prompt, plan)) return LLMCB_ENOMEM;
    if (setup->n_handlers && !llmcbi_prompt_copy_talk(p, prompt, plan))
        return LLMCB_ENOMEM;
    return LLMCB_OK;
}

/* What is wrong with the arguments of a call. */
static llmcb_code llmcbi_call_check(const llmcb_chat *chat,
                                    const llmcb_prompt *prompts, size_t n,
                                    const llmcb_config *config,
                                    const char **why)
{
    llmcb_code code;
    size_t i, k;

    *why = NULL;
    if (chat->error.code != LLMCB_OK) {
        *why = chat->error.message;
        return chat->error.code;
    }
    *why = llmcbi_config_check(chat->loop, config, &code);
    if (*why) return code;
    if (!prompts || !n) *why = "there is no prompt";
    if (!llmcbi_json_text_is(config->extra, LLMCBI_JSON_OBJECT))
        *why = "extra of the configuration is not a JSON object";
    if (*why) return LLMCB_EINVAL;
    for (i = 0; i < n; i++) {
        if (!prompts[i].messages || !prompts[i].n) {
            *why = "a prompt has no message";
            return LLMCB_EINVAL;
        }
        for (k = 0; k < prompts[i].n; k++) {
            code = llmcbi_message_check(&prompts[i].messages[k], why);
            if (code != LLMCB_OK) return code;
        }
    }
    return LLMCB_OK;
}

/* One block for what a call of n prompts takes anyway. */
static void llmcbi_call_room(llmcbi_call *c, const llmcbi_plan *plan)
{
    const llmcb_config *config = plan->config;
    const llmcb_chat_desc *d = &c->chat->d;
    size_t handlers = config->n_callbacks + config->n_local_callbacks +
                      d->n_callbacks + c->op.loop->n_hooks;

    llmcbi_arena_room(
        &c->op.loop->alloc, &c->arena,
        plan->batch * (sizeof *c->prompts + LLMCBI_ALIGN(plan->exchange_size) +
                       LLMCBI_ALIGN(handlers * sizeof(llmcbi_cursor))) +
            16 + LLMCBI_ALIGN(handlers * sizeof(void *)) +
            (c->pull ? LLMCBI_ALIGN(sizeof(llmcbi_reader)) : 0));
}

/* The runs of a call, ready to begin. */
LLMCBI_APART static llmcb_code llmcbi_call_build(llmcbi_call *c,
                                                 const llmcb_prompt *prompts,
                                                 llmcbi_plan *plan)
{
    const llmcb_allocator *a = &c->op.loop->alloc;
    const llmcb_config *config = plan->config;
    llmcb_transport *tr;
    size_t i, n = plan->batch;

    if (n > UINT32_MAX / 8 / sizeof *c->prompts) return LLMCB_ENOMEM;
    c->max_open =
        config->max_concurrency ? config->max_concurrency : (uint32_t)n;
    tr = llmcbi_chat_transport(c->chat);
    if (!tr) return LLMCB_ENOMEM;
    plan->exchange_size = llmcbi_exchange_size(tr);
    llmcbi_call_room(c, plan);
    c->prompts = /* before labels can have used up the room */
        (llmcbi_prompt *)llmcbi_arena_get(a, &c->arena, n * sizeof *c->prompts);
    llmcbi_setup_make(c->op.loop, &c->arena, &plan->setup, config,
                      &c->chat->own);
    if (c->arena.failed || plan->params.failed) return LLMCB_ENOMEM;
    for (i = 0; i < n; i++) {
        llmcb_code code;
        c->n++; /* what has been begun must be freed */
        code = llmcbi_prompt_init(&c->prompts[i], c, &prompts[i], plan);
        if (code != LLMCB_OK) return code;
    }
    if (config->run_id) memcpy(c->prompts[0].run.pub.id, config->run_id, 37);
    if (c->pull) {
        llmcbi_reader *r =
            (llmcbi_reader *)llmcbi_arena_get(a, &c->arena, sizeof *r);
        if (!r) return LLMCB_ENOMEM;
        r->pos = (const char *)&c->prompts[0].run.anchor;
        r->seq = 1;
        r->chunk.parts = &c->chat->rules.no_parts;
        c->prompts[0].run.reader = r;
    }
    return c->arena.failed ? LLMCB_ENOMEM : LLMCB_OK;
}

static llmcb_code llmcbi_call_make(llmcbi_call *c, const llmcb_prompt *prompts,
                                   size_t n, const llmcb_config *config,
                                   bool stream)
{
    const llmcb_allocator *a = &c->op.loop->alloc;
    llmcbi_plan plan;
    llmcb_code code;

    memset(&plan, 0, sizeof plan);
    plan.config = config;
    plan.batch = n;
    plan.stream = stream;
    llmcbi_wire_params(a, &plan.params, &c->chat->d, c->chat->openai, stream,
                       config->extra);
    code = llmcbi_call_build(c, prompts, &plan);
    llmcbi_buf_free(a, &plan.params);
    return code;
}

static llmcb_op *llmcbi_call_new(llmcb_chat *chat, const llmcb_prompt *prompts,
                                 size_t n, const llmcb_config *config,
                                 bool stream, bool pull)
{
    llmcb_loop *loop;
    llmcbi_call *c;
    llmcb_config none;
    llmcb_code code;
    const char *why = NULL;
    size_t i;

    if (!chat) return NULL;
    loop = chat->loop;
    code = llmcbi_enter(loop);
    if (code == LLMCB_ESTATE) return NULL; /* another thread's loop */
    c = (llmcbi_call *)(void *)llmcbi_op_new(loop, sizeof *c,
                                             &llmcbi_call_kind);
    if (!c) return NULL;
    memset(&none, 0, sizeof none);
    if (!config) config = &none;
    c->chat = chat;
    chat->refs++;
    c->pull = pull;
    c->ready.fn = llmcbi_call_step;
    if (code == LLMCB_OK && loop->freeing) code = LLMCB_ESTATE;
    if (code == LLMCB_OK)
        code = llmcbi_call_check(chat, prompts, n, config, &why);
    if (code == LLMCB_OK)
        code = llmcbi_call_make(c, prompts, n, config, stream);
    if (code != LLMCB_OK) {
        llmcbi_op_finish(&c->op, llmcbi_error_unstarted(loop, code, why));
        return &c->op;
    }
    c->op.run = &c->prompts[0].run.pub;
    llmcbi_run_adopt(config, &c->op);
    for (i = 0; i < c->n; i++)
        llmcbi_run_begin(&c->prompts[i].run, LLMCB_CHAT_MODEL_START,
                         c->prompts[i].run.start);
    return &c->op;
}

LLMCBI_DEF llmcb_op *llmcb_chat_generate(llmcb_chat *chat,
                                         const llmcb_message *messages,
                                         size_t n, const llmcb_config *config)
{
    llmcb_prompt one;

    one.messages = messages;
    one.n = n;
    return llmcbi_call_new(chat, &one, 1, config, chat && chat->d.streaming,
                           false);
}

LLMCBI_DEF llmcb_op *llmcb_chat_stream(llmcb_chat *chat,
                                       const llmcb_message *messages, size_t n,
                                       const llmcb_config *config)
{
    llmcb_prompt one;

    one.messages = messages;
    one.n = n;
    return llmcbi_call_new(chat, &one, 1, config, true, true);
}

LLMCBI_DEF llmcb_op *llmcb_chat_batch(llmcb_chat *chat,
                                      const llmcb_prompt *prompts, size_t n,
                                      const llmcb_config *config)
{
    return llmcbi_call_new(chat, prompts, n, config, chat && chat->d.streaming,
                           false);
}

/* -- reading a call */

static llmcbi_call *llmcbi_call_of(const llmcb_op *op)
{
    if (op && op->answer) op = op->answer;
    return op && op->kind == &llmcbi_call_kind
               ? (llmcbi_call *)llmcbi_unconst(op)
               : NULL;
}

/* The call that an op is; an agent only shows the result of one. */
static llmcbi_call *llmcbi_own_call(const llmcb_op *op)
{
    return op && !op->answer ? llmcbi_call_of(op) : NULL;
}

/* Passes the record that the pull interface stands at. */
static void llmcbi_call_pass(llmcbi_call *c)
{
    llmcbi_run *run = &c->prompts[0].run;

    llmcbi_record_take(&run->reader->pos);
    run->reader->seq++;
    run->reader->shown = false;
    if (run->starved) llmcbi_run_wake(run);
}

/* The next token record, in the program's hands until the next call. */
LLMCBI_APART static const llmcb_chunk *llmcbi_call_next(llmcbi_call *c)
{
    llmcbi_reader *r = c->prompts[0].run.reader;

    if (!r) return NULL;
    if (r->shown) llmcbi_call_pass(c);
    while (llmcbi_call_chunk_ready(c)) {
        const llmcbi_record *rec = llmcbi_record_at(&r->pos);
        r->shown = llmcbi_record_is_token(rec);
        if (r->shown) return llmcbi_record_token(rec, &r->chunk);
        llmcbi_call_pass(c);
    }
    return NULL;
}

LLMCBI_DEF bool llmcb_op_next(llmcb_op *op, const llmcb_chunk **chunk)
{
    const llmcb_chunk *got = NULL;
    llmcbi_call *c = llmcbi_own_call(op);

    if (chunk) *chunk = NULL;
    if (!c || !c->n || llmcbi_enter(op->loop) != LLMCB_OK) return false;
    for (;;) {
        got = llmcbi_call_next(c);
        if (got || op->done || op->loop->turning) break;
        if (!c->prompts[0].run.reader) { /* nothing to read: just wait */
            llmcb_op_wait(op);
            return false;
        }
        op->waiting = true; /* a callback may free it */
        llmcbi_turn(op->loop, -1);
        if (!llmcbi_op_waited(op)) return false;
    }
    if (chunk) *chunk = got;
    return got != NULL;
}

LLMCBI_DEF llmcb_step llmcb_await_chunk(llmcb_task *t, llmcb_op *op)
{
    llmcbi_task *task = llmcbi_await(t);
    llmcbi_call *c = llmcbi_own_call(op);
    const llmcbi_reader *r;
    llmcb_code code;

    if (!task) return LLMCB_WAIT;
    code = llmcbi_awaitable(task, op);
    if (code == LLMCB_OK && !c) code = LLMCB_EINVAL;
    if (code == LLMCB_OK && c->op.reader) code = LLMCB_EBUSY;
    if (code != LLMCB_OK || op->done) return llmcbi_await_over(task, code);
    r = c->prompts[0].run.reader;
    if (r && r->shown) llmcbi_call_pass(c); /* what it keeps fills the window */
    if (llmcbi_call_chunk_ready(c)) return llmcbi_await_over(task, LLMCB_OK);
    c->op.reader = task;
    task->slot = &c->op.reader;
    return LLMCB_WAIT;
}

LLMCBI_DEF size_t llmcb_op_n_prompts(const llmcb_op *op)
{
    const llmcbi_call *c = llmcbi_call_of(op);

    return c ? c->n : 0;
}

LLMCBI_DEF const llmcb_result *llmcb_op_result_at(const llmcb_op *op, size_t i)
{
    const llmcbi_call *c = llmcbi_call_of(op);

    if (!c || i >= c->n || !op->done || !c->prompts[i].outcome)
        return llmcbi_no_result();
    return &c->prompts[i].answer.result;
}

LLMCBI_DEF const llmcb_result *llmcb_op_result(const llmcb_op *op)
{
    return llmcb_op_result_at(op, 0);
}

LLMCBI_DEF const llmcb_error *llmcb_op_error_at(const llmcb_op *op, size_t i)
{
    const llmcbi_call *c = llmcbi_own_call(op);

    if (!c || i >= c->n || !op->done || !c->prompts[i].outcome)
        return llmcb_op_error(op);
    return c->prompts[i].outcome;
}

LLMCBI_DEF const llmcb_output *llmcb_op_output(const llmcb_op *op)
{
    static const llmcb_output none = { { "", 0 }, { "", 0 }, NULL, 0, false };

    return op && op->done && op->output ? op->output : &none;
}

LLMCBI_DEF llmcb_str llmcb_op_text(const llmcb_op *op)
{
    const llmcb_result *r = llmcb_op_result(op);

    if (op && op->output) return llmcb_op_output(op)->text;
    return r->n_generations ? r->generations[0].text : llmcbi_slice("", 0);
}

LLMCBI_DEF llmcb_run *llmcb_op_run(const llmcb_op *op)
{
    return op ? op->run : NULL;
}

LLMCBI_DEF llmcb_run *llmcb_op_run_at(const llmcb_op *op, size_t i)
{
    llmcbi_call *c = llmcbi_own_call(op);

    if (!c) return i ? NULL : llmcb_op_run(op);
    return i < c->n ? &c->prompts[i].run.pub : NULL;
}

/* Adds one usage to a sum that begins as known. */
LLMCBI_APART static void llmcbi_usage_add(llmcb_usage *sum,
                                          const llmcb_usage *u)
{
    sum->known = sum->known && u->known;
    sum->input_tokens += u->input_tokens;
    sum->output_tokens += u->output_tokens;
    sum->total_tokens += u->total_tokens;
    sum->cached_tokens += u->cached_tokens;
    sum->reasoning_tokens += u->reasoning_tokens;
}

LLMCBI_DEF llmcb_usage llmcb_op_usage(const llmcb_op *op)
{
    llmcb_usage sum = llmcbi_no_result()->usage;
    size_t i, n = llmcb_op_n_prompts(op);

    sum.known = n > 0;
    for (i = 0; i < n; i++)
        llmcbi_usage_add(&sum, &llmcb_op_result_at(op, i)->usage);
    if (op && op->usage) sum = *op->usage;
    return sum;
}

#ifndef LLMCB_NO_STDIO
LLMCBI_DEF void llmcb_str_print(llmcb_str text, FILE *out)
{
    size_t i;

    if (!text.ptr || !out) return;
    for (i = 0; i < text.len; i++) {
        unsigned char c = (unsigned char)text.ptr[i];
        unsigned char d = i + 1 < text.len ? (unsigned char)text.ptr[i + 1] : 0;
        unsigned char e = i + 2 < text.len ? (unsigned char)text.ptr[i + 2] : 0;
        if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F) {
            fprintf(out, "\\x%02x", c);
        } else if (c == 0xC2 && d >= 0x80 && d < 0xA0) {
            fprintf(out, "\\u%04x", (unsigned)d);
            i++;
        } else if (c == 0xE2 && ((d == 0x80 && e >= 0xAA && e <= 0xAE) ||
                                 (d == 0x81 && e >= 0xA6 && e <= 0xA9))) {
            fprintf(out, "\\u%04x",
                    0x2000u | (unsigned)(d & 63) << 6 | (unsigned)(e & 63));
            i += 2;
        } else {
            fputc(c, out);
        }
    }
}

static void llmcbi_print(FILE *out, const char *label, llmcb_str text)
{
    fputs(label, out);
    llmcb_str_print(text, out);
}

LLMCBI_DEF void llmcb_result_print(const llmcb_result *result, FILE *out)
{
    const llmcb_usage *u;
    size_t i, k;

    if (!result || !out) return;
    for (i = 0; i < result->n_generations; i++) {
        const llmcb_generation *g = &result->generations[i];
        llmcbi_print(out, "text: ", g->text);
        if (g->refusal.len) llmcbi_print(out, "\nrefusal: ", g->refusal);
        for (k = 0; k < g->n_tool_calls; k++) {
            llmcbi_print(out, "\ntool call: ", g->tool_calls[k].name);
            llmcbi_print(out, " ", g->tool_calls[k].arguments);
        }
        llmcbi_print(out, "\nfinish reason: ",
                     g->finish_reason.len ? g->finish_reason
                                          : llmcbi_slice("none", 4));
        fputs("\n", out);
    }
    llmcbi_print(out, "model name: ", result->model_name);
    u = &result->usage;
    if (u->known)
        fprintf(out, "\nusage: %lld input, %lld output, %lld total tokens\n",
                (long long)u->input_tokens, (long long)u->output_tokens,
                (long long)u->total_tokens);
    else
        fputs("\nusage: unknown\n", out);
}
#endif

/* ==== [AGENT] runs of the program, tools, the agent loop =============== */

#ifndef LLMCB_NO_AGENT

/* -- a run for work of the program's own */

/* The op that is linked there, or NULL: op->children, or the sibling.next of
 * one of them. */
static llmcb_op *llmcbi_op_at(llmcbi_link *l)
{
    return (llmcb_op *)(void *)l;
}

/* The start of op has been told. */
static void llmcbi_op_open(llmcb_op *op)
{
    llmcb_op *child;

    op->open = true;
    for (child = llmcbi_op_at(op->children); child;
         child = llmcbi_op_at(child->sibling.next))
        if (child->kind->begin) child->kind->begin(child);
}

typedef struct llmcbi_use llmcbi_use;

/* The work is a body, a tool, or what the program does until it ends it. */
typedef struct llmcbi_work {
    llmcb_op op;
    llmcbi_run run;
    llmcbi_rules rules;
    llmcbi_ready ready; /* looks what can go on */
    llmcbi_timer limit; /* timeout_ms */
    llmcbi_arena arena;
    llmcb_run_desc d;   /* what it points to is not kept */
    llmcb_config child; /* what children inherit */
    llmcb_start start;
    llmcb_output output;
    llmcb_op *body;
    llmcbi_use *use;                      /* of a tool */
    void (*freed)(struct llmcbi_work *w); /* of an agent */
    const llmcb_error *outcome;           /* NULL: not known yet */
    const llmcb_error *late;              /* a failure that changed no event */
    bool orphaned; /* destroyed but for somebody who is in its memory */
} llmcbi_work;

/* One call of a tool. It belongs to the loop's thread, or while there is a
 * job to the worker. */
struct llmcbi_use {
    llmcb_tool_use pub;
    const llmcb_allocator *alloc;
    llmcbi_arena arena; /* arguments that the tool has asked for */
    llmcbi_buf text;    /* the answer */
    char why[256];
    llmcbi_job *job;
    /* asks first; may be NULL */
    llmcb_step (*approve)(llmcb_task *t, const llmcb_tool_use *use);
    void *approver;
    size_t frame_size; /* of the coroutines */
    bool asking;
};

static void llmcbi_work_cancel(llmcb_op *op, llmcb_detail detail);
static void llmcbi_work_destroy(llmcb_op *op);
static void llmcbi_work_begin(llmcb_op *op);
static void llmcbi_work_child_done(llmcb_op *op, llmcb_op *child);
static void llmcbi_tool_begin(llmcbi_work *w);
static void llmcbi_tool_body_done(llmcbi_work *w, llmcb_code code);

static const llmcbi_op_kind llmcbi_work_kind = { llmcbi_work_cancel,
                                                 llmcbi_work_destroy, NULL,
                                                 llmcbi_work_begin,
                                                 llmcbi_work_child_done };

static llmcbi_work *llmcbi_work_of(const llmcb_op *op)
{
    return op && op->kind == &llmcbi_work_kind
               ? (llmcbi_work *)llmcbi_unconst(op)
               : NULL;
}

static llmcbi_work *llmcbi_work_of_run(llmcb_run *run)
{
    return run ? llmcbi_work_of(((llmcbi_run *)(void *)run)->home) : NULL;
}

/* Whether nobody but the program can end it, and it has not. */
static bool llmcbi_work_is_left(const llmcb_op *op)
{
    const llmcbi_work *w = llmcbi_work_of(op);

    return w && !w->d.body && !w->use && !w->outcome;
}

/* Cancels what is within it, or only what would never end. */
static void llmcbi_work_reap(llmcbi_work *w, bool all)
{
    llmcb_op *child;

    for (child = llmcbi_op_at(w->op.children); child;
         child = llmcbi_op_at(child->sibling.next))
        if (all || llmcbi_work_is_left(child))
            llmcbi_op_want_cancel(child, LLMCB_DETAIL_PARENT);
}

/* A failure of a tool that the model is to be told of. */
static bool llmcbi_work_handles(const llmcbi_work *w, const llmcb_error *e)
{
    /* ECANCELLED without a detail is the tool's own */
    return w->use && w->use->pub.tool->handle_errors &&
           (e->code != LLMCB_ECANCELLED || !e->detail) &&
           e->code != LLMCB_EHANDLER && e->detail != LLMCB_DETAIL_HANDLER &&
           e->code != LLMCB_OK;
}

/* The one place where an outcome becomes known. code LLMCB_OK: success. */
static void llmcbi_work_decide(llmcbi_work *w, const llmcb_error *e)
{
    const llmcb_allocator *a = &w->op.loop->alloc;

    if (w->outcome) return;
    if (llmcbi_work_handles(w, e)) {
        w->output.failed = true; /* no memory: without its words */
        w->output.text = llmcb_text(
            llmcbi_arena_text(a, &w->arena, e->message, strlen(e->message)));
        w->outcome = llmcbi_error_const(LLMCB_OK);
    } else {
        w->outcome = llmcbi_error_keep(a, e);
    }
    /* a body may yet end what it has begun */
    if (e->code != LLMCB_OK || !w->body)
        llmcbi_work_reap(w, e->code != LLMCB_OK);
    if (w->use && w->use->job && llmcbi_job_withdraw(w->op.loop, w->use->job))
        w->use->job = NULL;
    llmcbi_run_drain(&w->run);
    llmcbi_make_ready(w->op.loop, &w->ready);
}

static void llmcbi_work_fail(llmcbi_work *w, llmcb_code code,
                             const char *message)
{
    llmcb_error e;

    llmcbi_error_set(&e, code, message);
    llmcbi_work_decide(w, &e);
}

static void llmcbi_work_timed_out(llmcbi_timer *t)
{
    llmcbi_work *w = LLMCBI_OWNER(llmcbi_work, limit, t);
    llmcb_error e;

    if (!w->op.children && w->outcome) return; /* handlers have handler_ms */
    if (w->outcome && w->outcome->code == LLMCB_OK) w->outcome = NULL;
    llmcbi_error_set(&e, LLMCB_ETIMEDOUT,
                     "the run took longer than timeout_ms");
    e.detail = LLMCB_DETAIL_TOTAL;
    llmcbi_work_decide(w, &e);
}

/* From the pump. */
static void llmcbi_work_told(llmcbi_run *run)
{
    llmcbi_work *w = LLMCBI_OWNER(llmcbi_work, run, run);
    const llmcb_allocator *a = &run->loop->alloc;
    llmcb_error e;

    if (llmcbi_run_trouble(run, &e)) {
        if (run->state >= LLMCBI_RUN_DRAINED) {
            if (llmcbi_outcome_replaced(a, &w->late, &e))
                w->late = llmcbi_error_keep(a, &e);
        } else if (llmcbi_outcome_replaced(a, &w->outcome, &e)) {
            llmcbi_work_decide(w, &e);
        }
    }
    if (run->state != LLMCBI_RUN_OPEN || w->orphaned)
        llmcbi_make_ready(run->loop, &w->ready);
}

/* The body has ended, or another part of the run. */
static void llmcbi_work_child_done(llmcb_op *op, llmcb_op *child)
{
    llmcbi_work *w = (llmcbi_work *)(void *)op;

    llmcbi_make_ready(op->loop, &w->ready);
    if (child != w->body) return;
    w->body = NULL;
    child->detached = true; /* its finish destroys it */
    if (w->use)
        llmcbi_tool_body_done(w, child->error->code);
    else
        llmcbi_work_decide(w, child->error);
    if (w->outcome) llmcbi_work_reap(w, false);
}

static void llmcbi_work_begin_body(llmcbi_work *w)
{
    llmcb_loop *loop = w->op.loop;

    if (w->use) {
        llmcbi_tool_begin(w);
        return;
    }
    if (!w->d.body) return;
    w->body = llmcb_task_start(loop, w->d.body, w->d.frame_size, w->d.self);
    if (w->body)
        llmcbi_op_adopt(&w->op, w->body);
    else
        llmcbi_work_fail(w, LLMCB_ENOMEM, NULL);
}

static void llmcbi_work_free(llmcbi_work *w)
{
    llmcb_loop *loop = w->op.loop;
    const llmcb_allocator *a = &loop->alloc;

    if ((w->use && w->use->job) || llmcbi_run_in_use(&w->run)) {
        w->orphaned = true; /* later */
        return;
    }
    if (w->use) {
        llmcbi_arena_free(a, &w->use->arena);
        llmcbi_buf_free(a, &w->use->text);
    }
    if (w->freed) w->freed(w);
    llmcbi_unready(&w->ready);
    llmcbi_timer_free(loop, &w->limit);
    llmcbi_run_free(&w->run);
    llmcbi_error_drop(a, w->outcome);
    llmcbi_error_drop(a, w->late);
    llmcbi_arena_free(a, &w->arena);
    llmcbi_free(a, w, sizeof *w);
}

static void llmcbi_work_destroy(llmcb_op *op)
{
    llmcbi_work_free((llmcbi_work *)(void *)op);
}

static void llmcbi_work_limit(llmcbi_work *w)
{
    if (w->d.timeout_ms > 0)
        llmcbi_timer_start(w->op.loop, &w->limit, w->d.timeout_ms);
}

static void llmcbi_work_step(llmcbi_ready *r)
{
    llmcbi_work *w = LLMCBI_OWNER(llmcbi_work, ready, r);
    llmcbi_run *run = &w->run;
    const llmcb_allocator *a = &w->op.loop->alloc;

    if (w->orphaned) {
        llmcbi_work_free(w);
        return;
    }
    if (w->op.done || !llmcbi_run_settled(run)) return;
    if (run->state == LLMCBI_RUN_STARTING) {
        llmcbi_run_set_state(run, LLMCBI_RUN_OPEN);
        if (!w->use || !w->use->approve) llmcbi_work_limit(w);
        llmcbi_op_open(&w->op);
        llmcbi_work_begin_body(w);
    }
    if (run->state == LLMCBI_RUN_DRAINING && !w->op.open &&
        w->outcome->code == LLMCB_OK)
        llmcbi_op_open(&w->op); /* ended before; its parts wait for this */
    if (run->state == LLMCBI_RUN_DRAINING && !w->op.children) {
        llmcbi_timer_stop(w->op.loop, &w->limit);
        llmcbi_run_set_state(run, LLMCBI_RUN_DRAINED);
        llmcbi_run_finish(run, NULL,
                          w->outcome->code == LLMCB_OK ? &w->output : NULL,
                          w->outcome);
        return;
    }
    if (run->state != LLMCBI_RUN_FINISHING) return;
    llmcbi_run_set_state(run, LLMCBI_RUN_DONE);
    llmcbi_op_finish(&w->op, llmcbi_outcome_error(a, w->outcome, w->late));
}

static void llmcbi_work_cancel(llmcb_op *op, llmcb_detail detail)
{
    llmcbi_work *w = (llmcbi_work *)(void *)op;
    llmcb_error e;

    llmcbi_error_set(&e, LLMCB_ECANCELLED, NULL);
    e.detail = detail;
    if (w->run.state >= LLMCBI_RUN_DRAINED || w->run.skipping) {
        if (detail == LLMCB_DETAIL_LOOP)
            llmcbi_run_interrupt(&w->run);
        else if (detail == LLMCB_DETAIL_CALLER && !w->late) /* as of a call */
            w->late = llmcbi_error_keep(&op->loop->alloc, &e);
        llmcbi_work_reap(w, true); /* a body may await more; it is told */
        return;
    }
    if (w->outcome && w->outcome->code == LLMCB_OK) w->outcome = NULL;
    llmcbi_work_decide(w, &e);
    llmcbi_run_skip(&w->run);
}

static void llmcbi_work_begin(llmcb_op *op)
{
    llmcbi_run_release(&((llmcbi_work *)(void *)op)->run);
}

/* What children inherit, copied. */
static void llmcbi_work_keep_config(llmcbi_work *w, const llmcb_config *c)
{
    const llmcb_allocator *a = &w->op.loop->alloc;
    llmcb_handler **callbacks = (llmcb_handler **)llmcbi_arena_get(
        a, &w->arena, c->n_callbacks * sizeof *callbacks);
    const char **tags =
        (const char **)llmcbi_arena_get(a, &w->arena, c->n_tags * sizeof *tags);
    llmcb_pair *metadata = (llmcb_pair *)llmcbi_arena_get(
        a, &w->arena, c->n_metadata * sizeof *metadata);
    size_t i;

    if (w->arena.failed) return;
    for (i = 0; i < c->n_callbacks; i++)
        callbacks[i] = c->callbacks[i];
    for (i = 0; i < c->n_tags; i++)
        tags[i] = llmcbi_arena_copy(a, &w->arena, c->tags[i]);
    for (i = 0; i < c->n_metadata; i++) {
        metadata[i].key = llmcbi_arena_copy(a, &w->arena, c->metadata[i].key);
        metadata[i].value =
            llmcbi_arena_copy(a, &w->arena, c->metadata[i].value);
    }
    w->child.callbacks = callbacks;
    w->child.n_callbacks = c->n_callbacks;
    w->child.tags = tags;
    w->child.n_tags = c->n_tags;
    w->child.metadata = metadata;
    w->child.n_metadata = c->n_metadata;
    w->child.max_concurrency = c->max_concurrency;
    w->child.parent = &w->run.pub;
}

static llmcb_str llmcbi_work_copy(llmcbi_work *w, llmcb_str s)
{
    const llmcb_allocator *a = &w->op.loop->alloc;

    if (!s.ptr) s = llmcbi_slice("", 0);
    s = llmcbi_arena_str(a, &w->arena, s);
    if (w->arena.failed) s.len = 0;
    return s;
}

static llmcb_code llmcbi_work_build(llmcbi_work *w, const llmcb_config *config)
{
    llmcb_loop *loop = w->op.loop;
    const llmcb_allocator *a = &loop->alloc;
    static const char names[3][10] = { "chain", "tool", "retriever" };
    llmcb_run_desc *d = &w->d;
    const char *name = d->name ? d->name : names[d->kind];
    llmcb_config none;
    llmcbi_setup setup;
    llmcb_code code;

    memset(&none, 0, sizeof none);
    llmcbi_setup_make(loop, &w->arena, &setup, config, &none);
    llmcbi_work_keep_config(w, config);
    w->start.input = llmcbi_work_copy(w, d->input);
    w->start.description =
        llmcbi_arena_copy(a, &w->arena, d->description ? d->description : "");
    name = llmcbi_arena_copy(a, &w->arena, name);
    w->start.prompt = w->start.params = w->start.tool_call_id = w->output.text =
        w->output.log = llmcbi_slice("", 0);
    w->start.model = "";
    w->start.batch_size = 1;
    w->rules.told = llmcbi_work_told;
    w->rules.window_events = 1024;
    w->rules.window_bytes = (size_t)1 << 20;
    w->rules.handler_ms = llmcbi_span(d->handler_ms);
    w->run.rules = &w->rules;
    if (w->arena.failed ||
        !llmcbi_timer_init(loop, &w->limit, llmcbi_work_timed_out))
        return LLMCB_ENOMEM;
    code = llmcbi_run_init(loop, &w->run, &w->arena, setup.handlers,
                           setup.n_handlers, &w->op);
    if (code == LLMCB_OK)
        llmcbi_run_name(&w->run, &w->arena, config, &setup, name);
    if (config->run_id) memcpy(w->run.pub.id, config->run_id, 37);
    return w->arena.failed ? LLMCB_ENOMEM : code;
}

/* A run that is under way, or an op that has failed. What is special of it
 * may be added, since its start is told in the loop's next turn. */
static llmcbi_work *llmcbi_work_new(llmcb_loop *loop,
                                    const llmcb_run_desc *desc,
                                    const llmcb_config *config,
                                    const char *refused)
{
    static const llmcb_event_kind starts[3] = { LLMCB_CHAIN_START,
                                                LLMCB_TOOL_START,
                                                LLMCB_RETRIEVER_START };
    llmcb_code code = llmcbi_enter(loop);
    const char *why = refused;
    llmcb_config none;
    llmcbi_work *w;

    if (!loop || code == LLMCB_ESTATE) return NULL;
    w = (llmcbi_work *)(void *)llmcbi_op_new(loop, sizeof *w,
                                             &llmcbi_work_kind);
    if (!w) return NULL;
    memset(&none, 0, sizeof none);
    if (!config) config = &none;
    if (desc) w->d = *desc;
    w->ready.fn = llmcbi_work_step;
    if (code == LLMCB_OK && loop->freeing) code = LLMCB_ESTATE;
    if (code == LLMCB_OK && refused) code = LLMCB_EINVAL;
    if (code == LLMCB_OK) why = llmcbi_config_check(loop, config, &code);
    if (code == LLMCB_OK && (unsigned)w->d.kind > LLMCB_RUN_RETRIEVER)
        code = LLMCB_EINVAL;
    if (code == LLMCB_OK) code = llmcbi_work_build(w, config);
    if (code != LLMCB_OK) {
        llmcbi_op_finish(&w->op, llmcbi_error_unstarted(loop, code, why));
        return w;
    }
    w->op.run = &w->run.pub;
    w->op.output = &w->output;
    llmcbi_run_adopt(config, &w->op);
    llmcbi_run_begin(&w->run, starts[w->d.kind], &w->start);
    return w;
}

LLMCBI_DEF llmcb_op *llmcb_run_start(llmcb_loop *loop,
                                     const llmcb_run_desc *desc,
                                     const llmcb_config *config)
{
    llmcbi_work *w = llmcbi_work_new(loop, desc, config, NULL);

    return w ? &w->op : NULL;
}

LLMCBI_DEF llmcb_config llmcb_run_child(llmcb_run *run, const char *step)
{
    llmcbi_work *w = llmcbi_work_of_run(run);
    llmcb_config c;

    memset(&c, 0, sizeof c);
    if (w) c = w->child;
    c.step = step;
    return c;
}

LLMCBI_DEF llmcb_run *llmcb_task_run(llmcb_task *t)
{
    const llmcb_op *home = t ? ((llmcbi_task *)(void *)t)->home : NULL;
    llmcbi_work *w = home ? llmcbi_work_of(home->parent) : NULL;

    return w && w->body == home ? &w->run.pub : NULL;
}

/* The work of a run whose outcome is still open, on the loop's thread. */
static llmcb_code llmcbi_work_open(llmcb_run *run, llmcbi_work **w)
{
    llmcb_code code;

    if (!run) return LLMCB_ENOMEM;
    *w = llmcbi_work_of_run(run);
    if (!*w) return LLMCB_ESTATE;
    code = llmcbi_enter((*w)->op.loop);
    if (code != LLMCB_OK) return code;
    return (*w)->outcome || (*w)->use ? LLMCB_ESTATE : LLMCB_OK;
}

/* Ends it well, or if its output did not fit into memory, with that. */
static llmcb_code llmcbi_work_end(llmcbi_work *w)
{
    llmcb_code code = w->arena.failed ? LLMCB_ENOMEM : LLMCB_OK;

    llmcbi_work_fail(w, code, NULL);
    return code;
}

LLMCBI_DEF llmcb_code llmcb_run_end(llmcb_run *run, llmcb_str output)
{
    llmcbi_work *w;
    llmcb_code code = llmcbi_work_open(run, &w);

    if (code != LLMCB_OK) return code;
    w->output.text = llmcbi_work_copy(w, output);
    return llmcbi_work_end(w);
}

LLMCBI_DEF llmcb_code llmcb_run_end_documents(llmcb_run *run,
                                              const llmcb_document *documents,
                                              size_t n)
{
    llmcbi_work *w;
    llmcb_code code = llmcbi_work_open(run, &w);
    const llmcb_allocator *a;
    llmcb_document *to;
    size_t i, k;

    if (code != LLMCB_OK) return code;
    if (n && !documents) return LLMCB_EINVAL;
    for (i = 0; i < n; i++)
        if ((documents[i].n_metadata && !documents[i].metadata) ||
            !llmcbi_labels_ok(NULL, 0, documents[i].metadata,
                              documents[i].n_metadata))
            return LLMCB_EINVAL;
    a = &w->op.loop->alloc;
    to = (llmcb_document *)llmcbi_arena_get(a, &w->arena, n * sizeof *to);
    for (i = 0; to && i < n; i++) {
        const llmcb_document *from = &documents[i];
        llmcb_pair *pairs = (llmcb_pair *)llmcbi_arena_get(
            a, &w->arena, from->n_metadata * sizeof *pairs);
        to[i].content = llmcbi_work_copy(w, from->content);
        to[i].id = llmcbi_work_copy(w, from->id);
        for (k = 0; pairs && k < from->n_metadata; k++) {
            pairs[k].key =
                llmcbi_arena_copy(a, &w->arena, from->metadata[k].key);
            pairs[k].value =
                llmcbi_arena_copy(a, &w->arena, from->metadata[k].value);
        }
        to[i].metadata = pairs;
        to[i].n_metadata = from->n_metadata;
    }
    if (!w->arena.failed) {
        w->output.documents = to;
        w->output.n_documents = n;
    }
    return llmcbi_work_end(w);
}

static void llmcbi_clean(char *out, size_t cap, const char *s)
{
    llmcbi_copy_clean(out, cap, s, strnlen(s, cap));
}

LLMCBI_DEF llmcb_code llmcb_run_fail(llmcb_run *run, const llmcb_error *error)
{
    llmcbi_work *w;
    llmcb_code code = llmcbi_work_open(run, &w);
    llmcb_error e;

    if (code != LLMCB_OK) return code;
    if (!error || error->code == LLMCB_OK) {
        llmcbi_error_set(&e, LLMCB_EINVAL, NULL);
    } else {
        e = *error;
        llmcbi_clean(e.type, sizeof e.type, error->type);
        llmcbi_clean(e.provider_code, sizeof e.provider_code,
                     error->provider_code);
        llmcbi_clean(e.request_id, sizeof e.request_id, error->request_id);
        llmcbi_clean(e.message, sizeof e.message, error->message);
        if (!*e.message) llmcbi_error_set(&e, error->code, NULL);
    }
    llmcbi_work_decide(w, &e);
    return e.code;
}

/* -- events of agents */

static llmcb_str llmcbi_or_empty(llmcb_str s)
{
    return s.ptr ? s : llmcbi_slice("", 0);
}

/* Whether an event may be appended to the run now. */
static llmcb_code llmcbi_work_room(llmcb_run *run, llmcbi_work **w)
{
    llmcb_code code = llmcbi_work_open(run, w);

    if (code == LLMCB_OK && !llmcbi_run_fits(&(*w)->run)) code = LLMCB_EBUSY;
    return code;
}

LLMCBI_DEF llmcb_code llmcb_run_action(llmcb_run *run,
                                       const llmcb_action *action)
{
    llmcbi_work *w;
    llmcb_code code = llmcbi_work_room(run, &w);
    llmcb_action from, *to;
    size_t size;
    char *at;

    if (code != LLMCB_OK) return code;
    if (!action) return LLMCB_EINVAL;
    from.tool = llmcbi_or_empty(action->tool);
    from.input = llmcbi_or_empty(action->input);
    from.log = llmcbi_or_empty(action->log);
    from.tool_call_id = llmcbi_or_empty(action->tool_call_id);
    size = sizeof from + from.tool.len + from.input.len + from.log.len +
           from.tool_call_id.len + 4;
    at = llmcbi_run_reserve(&w->run, size);
    if (!at) return LLMCB_ENOMEM;
    to = (llmcb_action *)(void *)at;
    at += sizeof *to;
    to->tool = llmcbi_record_text(&at, from.tool.ptr, from.tool.len);
    to->input = llmcbi_record_text(&at, from.input.ptr, from.input.len);
    to->log = llmcbi_record_text(&at, from.log.ptr, from.log.len);
    to->tool_call_id =
        llmcbi_record_text(&at, from.tool_call_id.ptr, from.tool_call_id.len);
    llmcbi_run_commit(&w->run, LLMCB_AGENT_ACTION, size);
    return LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_run_agent_finish(llmcb_run *run, llmcb_str output,
                                             llmcb_str log)
{
    llmcbi_work *w;
    llmcb_code code = llmcbi_work_room(run, &w);
    llmcb_output *to;
    size_t size;
    char *at;

    if (code != LLMCB_OK) return code;
    output = llmcbi_or_empty(output);
    log = llmcbi_or_empty(log);
    size = sizeof *to + output.len + log.len + 2;
    at = llmcbi_run_reserve(&w->run, size);
    if (!at) return LLMCB_ENOMEM;
    to = (llmcb_output *)(void *)at;
    memset(to, 0, sizeof *to);
    at += sizeof *to;
    to->text = llmcbi_record_text(&at, output.ptr, output.len);
    to->log = llmcbi_record_text(&at, log.ptr, log.len);
    llmcbi_run_commit(&w->run, LLMCB_AGENT_FINISH, size);
    return LLMCB_OK;
}

/* -- the arguments of a tool */

/* Stands before the value of a member. false: there is none. */
static bool llmcbi_member(llmcb_str object, llmcb_str name, llmcbi_json *j)
{
    llmcbi_json_init(j, object.ptr, object.len);
    if (llmcbi_json_next(j) != LLMCBI_JSON_OBJECT) return false;
    while (llmcbi_json_next(j) == LLMCBI_JSON_KEY) {
        if (llmcbi_json_is_text(j, name)) return true;
        llmcbi_json_skip(j, llmcbi_json_next(j));
    }
    return false;
}

static bool llmcbi_use_value(llmcb_tool_use *use, const char *name,
                             llmcbi_json *j, llmcbi_json_type type)
{
    return use && llmcbi_member(use->arguments, llmcb_text(name), j) &&
           llmcbi_json_next(j) == type;
}

/* The last key or string, decoded. false: no memory. */
static bool llmcbi_use_text(llmcbi_use *u, const llmcbi_json *j,
                            llmcb_str *value)
{
    llmcbi_carry c;
    char *to, *end;

    if (j->len > SIZE_MAX / 8) return false;
    to = (char *)llmcbi_arena_get(u->alloc, &u->arena, 3 * j->len + 13);
    if (!to) return false;
    memset(&c, 0, sizeof c);
    end =
        llmcbi_carry_flush(to + llmcbi_json_decode(to, j->str, j->len, &c), &c);
    *value = llmcbi_slice(to, (size_t)(end - to));
    return true;
}

LLMCBI_DEF bool llmcb_tool_text(llmcb_tool_use *use, const char *name,
                                llmcb_str *value)
{
    llmcbi_json j;

    return llmcbi_use_value(use, name, &j, LLMCBI_JSON_STRING) &&
           llmcbi_use_text((llmcbi_use *)(void *)use, &j, value);
}

LLMCBI_DEF bool llmcb_tool_int(llmcb_tool_use *use, const char *name,
                               int64_t *value)
{
    llmcbi_json j;

    return llmcbi_use_value(use, name, &j, LLMCBI_JSON_NUMBER) &&
           llmcbi_json_int(&j, value);
}

/* The last number, if it is one that a double can hold. */
static bool llmcbi_json_double(const llmcbi_json *j, double *value)
{
    char digits[400 + 24], exponent[24], *to = digits, *end;
    bool fraction = false, negative;
    int64_t e = 0, places = 0;
    size_t i;
    double v;

    if (j->len >= 400) return false;
    /* without a point, which is another one in another locale */
    for (i = 0; i < j->len && j->str[i] != 'e' && j->str[i] != 'E'; i++) {
        if (j->str[i] == '.') {
            fraction = true;
            continue;
        }
        *to++ = j->str[i];
        places += fraction;
    }
    negative = i + 1 < j->len && j->str[i + 1] == '-';
    for (i++; i < j->len; i++)
        if (j->str[i] >= '0' && j->str[i] <= '9' && e < 100000)
            e = e * 10 + (j->str[i] - '0');
    *to++ = 'e';
    strcpy(to, llmcbi_decimal(exponent, (negative ? -e : e) - places));
    v = strtod(digits, &end);
    if (*end || v - v != 0) return false; /* or it is infinite */
    *value = v;
    return true;
}

LLMCBI_DEF bool llmcb_tool_number(llmcb_tool_use *use, const char *name,
                                  double *value)
{
    llmcbi_json j;

    return llmcbi_use_value(use, name, &j, LLMCBI_JSON_NUMBER) &&
           llmcbi_json_double(&j, value);
}

LLMCBI_DEF bool llmcb_tool_bool(llmcb_tool_use *use, const char *name,
                                bool *value)
{
    llmcbi_json j;
    bool yes = llmcbi_use_value(use, name, &j, LLMCBI_JSON_TRUE);

    if (!yes && !llmcbi_use_value(use, name, &j, LLMCBI_JSON_FALSE))
        return false;
    *value = yes;
    return true;
}

LLMCBI_DEF bool llmcb_tool_json(llmcb_tool_use *use, const char *name,
                                llmcb_str *value)
{
    llmcbi_use *u = (llmcbi_use *)(void *)use;
    llmcbi_json j;
    llmcb_str copy;

    if (!u || !llmcbi_member(use->arguments, llmcb_text(name), &j))
        return false;
    llmcbi_json_raw(&j);
    copy = llmcbi_arena_str(u->alloc, &u->arena, llmcbi_slice(j.str, j.len));
    if (u->arena.failed) return false;
    *value = copy;
    return true;
}

LLMCBI_DEF llmcb_code llmcb_tool_answer(llmcb_tool_use *use, llmcb_str text)
{
    llmcbi_use *u = (llmcbi_use *)(void *)use;

    if (!u) return LLMCB_ENOMEM;
    u->text.len = 0;
    if (text.ptr) llmcbi_buf_add(u->alloc, &u->text, text.ptr, text.len);
    return u->text.failed ? LLMCB_ENOMEM : LLMCB_OK;
}

LLMCBI_DEF llmcb_code llmcb_tool_fail(llmcb_tool_use *use, const char *why)
{
    llmcbi_use *u = (llmcbi_use *)(void *)use;

    if (u && why) llmcbi_copy_clean(u->why, sizeof u->why, why, strlen(why));
    return LLMCB_ETOOL;
}

/* -- the schema of the arguments: types and required members */

static bool llmcbi_is_whole(const llmcbi_json *j)
{
    bool point = false;
    size_t i;

    for (i = 0; i < j->len; i++) {
        char c = j->str[i];
        if (c == 'e' || c == 'E' || (point && c != '0')) return false;
        point |= c == '.';
    }
    return true;
}

/* How a value suits a schema's type. */
typedef enum llmcbi_fit {
    LLMCBI_FIT_NOT,
    LLMCBI_FIT_RANGE, /* no C type that the tool can ask for holds it */
    LLMCBI_FIT
} llmcbi_fit;

static llmcbi_fit llmcbi_number_fits(const llmcbi_json *j, bool integer)
{
    int64_t whole;
    double number;

    if (integer && !llmcbi_is_whole(j)) return LLMCBI_FIT_NOT;
    if (integer ? llmcbi_json_int(j, &whole) : llmcbi_json_double(j, &number))
        return LLMCBI_FIT;
    return LLMCBI_FIT_RANGE;
}

/* A value, whose first token j has just read, and one type. A type that is
 * not known allows all. */
static llmcbi_fit llmcbi_fits_type(const llmcbi_json *j, llmcbi_json_type value,
                                   const llmcbi_json *type)
{
    bool integer = llmcbi_json_is(type, "integer"), fits = true;

    if (integer || llmcbi_json_is(type, "number"))
        return value == LLMCBI_JSON_NUMBER ? llmcbi_number_fits(j, integer)
                                           : LLMCBI_FIT_NOT;
    if (llmcbi_json_is(type, "string")) fits = value == LLMCBI_JSON_STRING;
    if (llmcbi_json_is(type, "boolean"))
        fits = value == LLMCBI_JSON_TRUE || value == LLMCBI_JSON_FALSE;
    if (llmcbi_json_is(type, "array")) fits = value == LLMCBI_JSON_ARRAY;
    if (llmcbi_json_is(type, "object")) fits = value == LLMCBI_JSON_OBJECT;
    if (llmcbi_json_is(type, "null")) fits = value == LLMCBI_JSON_NULL;
    return fits ? LLMCBI_FIT : LLMCBI_FIT_NOT;
}

/* A value and a schema's "type", which may be a list: the best of it. */
static llmcbi_fit llmcbi_fits(const llmcbi_json *j, llmcbi_json_type value,
                              llmcb_str schema)
{
    llmcbi_fit fit, best = LLMCBI_FIT_NOT;
    llmcbi_json type;
    llmcbi_json_type t;

    if (!llmcbi_member(schema, llmcb_text("type"), &type)) return LLMCBI_FIT;
    t = llmcbi_json_next(&type);
    if (t == LLMCBI_JSON_STRING) return llmcbi_fits_type(j, value, &type);
    if (t != LLMCBI_JSON_ARRAY) return LLMCBI_FIT;
    while (llmcbi_json_next(&type) == LLMCBI_JSON_STRING) {
        fit = llmcbi_fits_type(j, value, &type);
        if (fit > best) best = fit;
    }
    return best;
}

static bool llmcbi_arguments_wrong(char *why, size_t cap, const char *text,
                                   const llmcbi_json *name)
{
    size_t used;

    llmcbi_copy_clean(why, cap, text, strlen(text));
    used = strlen(why);
    if (name) llmcbi_json_clean(why + used, cap - used, name->str, name->len);
    return false;
}

/* A name, to look for. false: no memory. */
static bool llmcbi_use_name(llmcbi_use *u, const llmcbi_json *j,
                            llmcb_str *name)
{
    *name = llmcbi_slice(j->str, j->len);
    return !j->escaped || llmcbi_use_text(u, j, name);
}

/* false: `why` says what is wrong with the arguments, or the arena that there
 * was no memory. */
static bool llmcbi_arguments_check(llmcbi_use *u)
{
    const char *parameters = u->pub.tool->parameters;
    llmcb_str schema = llmcb_text(parameters ? parameters : "{}");
    llmcb_str arguments = u->pub.arguments, name;
    size_t cap = sizeof u->why;
    llmcbi_json j, s, p;
    llmcbi_fit fit;
    char *why = u->why;
    bool closed;

    llmcbi_json_init(&j, arguments.ptr, arguments.len);
    if (llmcbi_json_raw(&j) != LLMCBI_JSON_OBJECT || !llmcbi_json_whole(&j))
        return llmcbi_arguments_wrong(
            why, cap, "the arguments are not one JSON object", NULL);
    if (llmcbi_member(schema, llmcb_text("required"), &s) &&
        llmcbi_json_next(&s) == LLMCBI_JSON_ARRAY)
        while (llmcbi_json_next(&s) == LLMCBI_JSON_STRING) {
            if (!llmcbi_use_name(u, &s, &name)) return false;
            if (!llmcbi_member(arguments, name, &j))
                return llmcbi_arguments_wrong(why, cap,
                                              "missing argument: ", &s);
        }
    closed = llmcbi_member(schema, llmcb_text("additionalProperties"), &s) &&
             llmcbi_json_next(&s) == LLMCBI_JSON_FALSE;
    schema = llmcbi_member(schema, llmcb_text("properties"), &s) &&
                     llmcbi_json_raw(&s) == LLMCBI_JSON_OBJECT
                 ? llmcbi_slice(s.str, s.len)
                 : llmcb_text("{}");
    llmcbi_json_init(&j, arguments.ptr, arguments.len);
    llmcbi_json_next(&j);
    while (llmcbi_json_next(&j) == LLMCBI_JSON_KEY) {
        llmcbi_json key = j;
        llmcbi_json_type value = llmcbi_json_next(&j);
        if (!llmcbi_use_name(u, &key, &name)) return false;
        if (!llmcbi_member(schema, name, &p)) {
            if (closed)
                return llmcbi_arguments_wrong(why, cap,
                                              "unknown argument: ", &key);
        } else if (llmcbi_json_raw(&p) == LLMCBI_JSON_OBJECT) {
            fit = llmcbi_fits(&j, value, llmcbi_slice(p.str, p.len));
            if (fit == LLMCBI_FIT_RANGE)
                return llmcbi_arguments_wrong(why, cap,
                                              "argument out of range: ", &key);
            if (fit == LLMCBI_FIT_NOT)
                return llmcbi_arguments_wrong(
                    why, cap, "argument of the wrong type: ", &key);
        }
        llmcbi_json_skip(&j, value);
    }
    return true;
}

/* -- a call of a tool */

static void llmcbi_tool_ended(llmcbi_work *w, llmcb_code code)
{
    llmcbi_use *u = w->use;

    if (w->outcome) return;
    if (code == LLMCB_OK && u->text.failed) code = LLMCB_ENOMEM;
    if (code == LLMCB_EHANDLER) code = LLMCB_ETOOL;
    w->output.text = llmcbi_buf_str(&u->text);
    llmcbi_work_fail(w, code, code == LLMCB_ETOOL ? u->why : NULL);
}

static int llmcbi_tool_call(void *arg)
{
    llmcbi_use *u = (llmcbi_use *)arg;

    return u->pub.tool->call(&u->pub);
}

static void llmcbi_tool_called(llmcbi_job *job)
{
    llmcbi_work *w = (llmcbi_work *)job->owner;

    w->use->job = NULL;
    llmcbi_make_ready(w->op.loop, &w->ready);
    llmcbi_tool_ended(w, llmcbi_code_of(job->result));
}

/* Calls the tool itself: a job, or the body goes on with it. */
static void llmcbi_tool_run(llmcbi_work *w)
{
    llmcb_loop *loop = w->op.loop;
    const llmcb_error *e;
    llmcb_code code;

    w->use->job = llmcbi_job_start(loop, llmcbi_tool_call, w->use,
                                   llmcbi_tool_called, w, &code);
    if (w->use->job) return;
    e = llmcbi_error_unstarted(loop, code, NULL);
    llmcbi_work_decide(w, e);
    llmcbi_error_drop(&loop->alloc, e);
}

/* The approval, then the tool if it is a coroutine. */
static llmcb_step llmcbi_tool_step(llmcb_task *t)
{
    llmcbi_task *task = (llmcbi_task *)(void *)t;
    llmcbi_work *w = llmcbi_work_of(task->home->parent);
    llmcbi_use *u = w->use;
    const llmcb_tool *tool = u->pub.tool;
    llmcb_step step;

    if (u->asking) {
        step = u->approve(t, &u->pub);
        if (step == LLMCB_WAIT || w->outcome) return step;
        u->asking = false;
        if (step != LLMCB_DONE) {
            w->output.failed = true;
            w->output.text = llmcb_text("The call was refused.");
            llmcbi_work_fail(w, LLMCB_OK, NULL);
            return LLMCB_DONE;
        }
        llmcbi_work_limit(w); /* who approves takes his time */
        if (tool->call) return LLMCB_DONE;
        t->at = 0;
        t->result = LLMCB_OK;
        t->self = tool->user;
        if (tool->frame_size)
            memset(t->frame, 0, tool->frame_size);
        else
            t->frame = NULL; /* that was for the approval */
    }
    return tool->step(t, &u->pub);
}

static void llmcbi_tool_body_done(llmcbi_work *w, llmcb_code code)
{
    if (w->outcome) return;
    if (w->use->pub.tool->call && code == LLMCB_OK)
        llmcbi_tool_run(w);
    else
        llmcbi_tool_ended(w, code);
}

/* The start has been told. */
static void llmcbi_tool_begin(llmcbi_work *w)
{
    llmcbi_use *u = w->use;
    const llmcb_tool *tool = u->pub.tool;

    if (!llmcbi_arguments_check(u)) {
        llmcbi_work_fail(w, u->arena.failed ? LLMCB_ENOMEM : LLMCB_ETOOL,
                         u->why);
        return;
    }
    if (!u->approve && tool->call) {
        llmcbi_tool_run(w);
        return;
    }
    u->asking = u->approve != NULL;
    w->body = llmcb_task_start(w->op.loop, llmcbi_tool_step, u->frame_size,
                               u->asking ? u->approver : tool->user);
    if (w->body)
        llmcbi_op_adopt(&w->op, w->body);
    else
        llmcbi_work_fail(w, LLMCB_ENOMEM, NULL);
}

static const char *llmcbi_tool_wrong(const llmcb_tool *tool)
{
    if (!tool || !tool->name || !*tool->name) return "a tool has no name";
    if (!tool->call == !tool->step)
        return "a tool needs one function, call or step";
    if (!llmcbi_json_text_is(tool->parameters, LLMCBI_JSON_OBJECT))
        return "the parameters of a tool are not a JSON object";
    if (!llmcbi_utf8_valid(tool->name, strlen(tool->name)) ||
        (tool->description &&
         !llmcbi_utf8_valid(tool->description, strlen(tool->description))))
        return "a tool's name or description is not valid UTF-8";
    return NULL;
}

static llmcbi_work *llmcbi_tool_new(llmcb_loop *loop, const llmcb_tool *tool,
                                    const llmcb_tool_call *call,
                                    const llmcb_agent_desc *agent,
                                    const llmcb_config *config)
{
    const char *wrong = llmcbi_tool_wrong(tool);
    llmcb_run_desc d;
    llmcbi_work *w;
    llmcbi_use *u;

    memset(&d, 0, sizeof d);
    d.kind = LLMCB_RUN_TOOL;
    d.handler_ms = agent ? agent->handler_ms : 0;
    d.input = llmcb_text("{}");
    if (call && call->arguments.len) d.input = call->arguments;
    if (!wrong) {
        d.name = tool->name;
        d.description = tool->description;
        d.timeout_ms = tool->timeout_ms;
    }
    w = llmcbi_work_new(loop, &d, config, wrong);
    if (!w || w->op.done) return w;
    u = (llmcbi_use *)llmcbi_arena_get(&loop->alloc, &w->arena, sizeof *u);
    if (call && call->id.len)
        w->start.tool_call_id = llmcbi_work_copy(w, call->id);
    if (w->arena.failed) {
        llmcbi_work_fail(w, LLMCB_ENOMEM, NULL);
        return w;
    }
    u->pub.tool = tool;
    u->pub.arguments = w->start.input;
    u->pub.id = w->start.tool_call_id;
    u->pub.run = &w->run.pub;
    u->alloc = &loop->alloc;
    u->frame_size = tool->frame_size;
    if (agent && agent->approve) {
        u->approve = agent->approve;
        u->approver = agent->user;
        if (u->frame_size < agent->approve_frame)
            u->frame_size = agent->approve_frame;
    }
    w->use = u;
    return w;
}

LLMCBI_DEF llmcb_op *llmcb_tool_start(llmcb_loop *loop, const llmcb_tool *tool,
                                      const llmcb_tool_call *call,
                                      const llmcb_config *config)
{
    llmcbi_work *w = llmcbi_tool_new(loop, tool, call, NULL, config);

    return w ? &w->op : NULL;
}

/* -- the agent loop */

typedef struct llmcbi_agent {
    llmcbi_work *w;
    llmcb_agent_desc d;
    llmcbi_arena arena;      /* the texts of the messages */
    llmcb_message *messages; /* the conversation so far */
    size_t n, cap;
    llmcbi_buf extra;             /* what goes into each request: the tools */
    llmcb_op *turn, *ask;         /* the run of this turn, the model's call */
    const llmcb_tool_call *calls; /* of this turn, in the answer of `ask` */
    size_t n_calls, i;
    llmcb_op **tools;   /* their runs */
    llmcb_op **waiting; /* those that are under way */
    size_t n_waiting;
    int turns;
    int64_t began; /* total_ms counts from then */
    uint64_t told; /* events that the tools come after */
    llmcb_usage usage;
    bool known; /* that of the turns before this one */
} llmcbi_agent;

static const llmcb_allocator *llmcbi_agent_alloc(const llmcbi_agent *g)
{
    return &g->w->op.loop->alloc;
}

/* What the model is told of the tools, and what the caller wishes. */
static void llmcbi_agent_extra(llmcbi_agent *g, const char *extra)
{
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    llmcbi_buf *b = &g->extra;
    size_t i;

    llmcbi_buf_text(a, b, "{");
    llmcbi_wire_members(a, b, extra, NULL, NULL);
    if (g->d.n_tools && !llmcbi_has_member(extra, "tools")) {
        llmcbi_buf_text(a, b, b->len > 1 ? ",\"tools\":" : "\"tools\":");
        for (i = 0; i < g->d.n_tools; i++) {
            const llmcb_tool *t = &g->d.tools[i];
            llmcbi_buf_print(a, b,
                             "%s{\"type\":\"function\",\"function\":"
                             "{\"name\":\"%j\"",
                             i ? "," : "[", t->name);
            if (t->description)
                llmcbi_buf_print(a, b, ",\"description\":\"%j\"",
                                 t->description);
            llmcbi_buf_print(a, b, ",\"parameters\":%s}}",
                             t->parameters ? t->parameters
                                           : "{\"type\":\"object\","
                                             "\"properties\":{}}");
        }
        llmcbi_buf_text(a, b, "]");
    }
    llmcbi_buf_text(a, b, "}");
}

/* Room for n more messages. */
static bool llmcbi_agent_grow(llmcbi_agent *g, size_t n)
{
    size_t cap = g->cap ? g->cap : 8;
    llmcb_message *grown;

    while (cap < g->n + n)
        cap *= 2;
    if (cap == g->cap) return true;
    grown = (llmcb_message *)llmcbi_resize(llmcbi_agent_alloc(g), g->messages,
                                           g->cap * sizeof *grown,
                                           cap * sizeof *grown);
    if (!grown) return false;
    g->messages = grown;
    g->cap = cap;
    return true;
}

static llmcb_message *llmcbi_agent_say(llmcbi_agent *g, llmcb_role role,
                                       llmcb_str text)
{
    llmcb_message *m = &g->messages[g->n++];
    char *at;

    memset(m, 0, sizeof *m);
    m->role = role;
    m->content = "";
    at = (char *)llmcbi_arena_get(llmcbi_agent_alloc(g), &g->arena,
                                  3 * text.len + 4);
    if (!at) return m;
    text = llmcbi_record_utf8(&at, text); /* a tool may answer anything */
    m->content = text.ptr;
    m->content_len = text.len;
    return m;
}

/* The run's error, and what the body returns. */
static llmcb_step llmcbi_agent_fail(llmcbi_agent *g, const llmcb_error *e)
{
    llmcbi_work_decide(g->w, e);
    return e->code;
}

/* The failure of a tool, with its name. */
static llmcb_step llmcbi_agent_fail_by(llmcbi_agent *g, const llmcb_op *tool)
{
    const llmcbi_work *w = (const llmcbi_work *)(const void *)tool;
    const char *name = w->run.pub.name, *words = tool->error->message;
    llmcb_error e = *tool->error;

    if (!name) return llmcbi_agent_fail(g, tool->error); /* no memory */
    e.message[0] = '\0';
    llmcbi_error_add(&e, name, strlen(name));
    llmcbi_error_add(&e, ": ", 2);
    llmcbi_error_add(&e, words, strlen(words));
    return llmcbi_agent_fail(g, &e);
}

static void llmcbi_agent_drop_tools(llmcbi_agent *g)
{
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    size_t i;

    /* there may be calls of the model, but no tools yet */
    for (i = 0; g->tools && i < g->n_calls && !g->w->op.loop->closed; i++)
        llmcb_op_free(g->tools[i]);
    llmcbi_free(a, g->tools, g->n_calls * sizeof *g->tools);
    llmcbi_free(a, g->waiting, g->n_calls * sizeof *g->waiting);
    g->tools = g->waiting = NULL;
    g->n_calls = g->n_waiting = 0;
}

/* A loop that is being released destroys all operations by itself. */
static void llmcbi_agent_drop_turn(llmcbi_agent *g)
{
    g->w->op.answer = NULL;
    if (!g->w->op.loop->closed) {
        llmcb_op_free(g->ask);
        llmcb_op_free(g->turn);
    }
    g->ask = g->turn = NULL;
}

static void llmcbi_agent_freed(llmcbi_work *w)
{
    llmcbi_agent *g = (llmcbi_agent *)w->d.self;
    const llmcb_allocator *a = &w->op.loop->alloc;

    llmcbi_agent_drop_tools(g);
    llmcbi_agent_drop_turn(g);
    llmcbi_arena_free(a, &g->arena);
    llmcbi_buf_free(a, &g->extra);
    llmcbi_free(a, g->messages, g->cap * sizeof *g->messages);
    llmcbi_free(a, g, sizeof *g);
}

/* Asks the model, in a run for the turn. */
static llmcb_code llmcbi_agent_ask(llmcbi_agent *g)
{
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    const llmcb_message *last = &g->messages[g->n - 1];
    llmcb_config config = llmcb_run_child(&g->w->run.pub, NULL);
    llmcb_run_desc d;
    llmcbi_buf prompt;
    llmcb_code code;

    llmcbi_agent_drop_turn(g);
    memset(&d, 0, sizeof d);
    d.name = "RunnableSequence";
    d.input = llmcbi_slice(last->content, last->content_len);
    d.handler_ms = g->d.handler_ms;
    g->turn = llmcb_run_start(g->w->op.loop, &d, &config);
    if (!g->turn) return LLMCB_ENOMEM;
    if (g->turn->done) return g->turn->error->code;
    memset(&prompt, 0, sizeof prompt);
    llmcbi_wire_prompt(a, &prompt, g->messages, g->n);
    code = prompt.failed
               ? LLMCB_ENOMEM
               : llmcb_run_text(g->turn->run, llmcbi_buf_str(&prompt));
    llmcbi_buf_free(a, &prompt);
    if (code != LLMCB_OK) return code;
    config = llmcb_run_child(g->turn->run, "seq:step:1");
    config.extra = g->extra.ptr;
    g->ask = llmcb_chat_generate(g->d.chat, g->messages, g->n, &config);
    g->w->op.answer = g->ask;
    g->known = g->usage.known;
    g->usage.known = false; /* until it has answered */
    return g->ask ? LLMCB_OK : LLMCB_ENOMEM;
}

/* Ends the run of the turn as the model's call has ended. */
static void llmcbi_agent_answered(llmcbi_agent *g)
{
    const llmcb_result *r = llmcb_op_result(g->ask);

    g->usage.known = g->known;
    llmcbi_usage_add(&g->usage, &r->usage);
    if (g->ask->error->code != LLMCB_OK) {
        llmcb_run_fail(g->turn->run, g->ask->error);
        return;
    }
    llmcb_run_end(g->turn->run, llmcb_op_text(g->ask));
    if (!r->n_generations) return;
    g->calls = r->generations[0].tool_calls;
    g->n_calls = r->generations[0].n_tool_calls;
}

static llmcb_code llmcbi_agent_act(llmcbi_agent *g, size_t i)
{
    llmcb_action action;

    action.tool = g->calls[i].name;
    action.input = g->calls[i].arguments;
    action.log = llmcb_op_text(g->ask);
    action.tool_call_id = g->calls[i].id;
    return llmcb_run_action(&g->w->run.pub, &action);
}

/* A tool that the model made up is answered by one of ours. */
static llmcb_step llmcbi_invalid_tool_step(llmcb_task *t, llmcb_tool_use *use)
{
    llmcbi_use *u = (llmcbi_use *)(void *)use;
    llmcb_str name, names;

    (void)t;
    if (!llmcb_tool_text(use, "requested_tool_name", &name) ||
        !llmcb_tool_text(use, "available_tool_names", &names))
        return LLMCB_ENOMEM;
    llmcbi_buf_add(u->alloc, &u->text, name.ptr, name.len);
    llmcbi_buf_text(u->alloc, &u->text, " is not a valid tool, try one of [");
    llmcbi_buf_add(u->alloc, &u->text, names.ptr, names.len);
    llmcbi_buf_text(u->alloc, &u->text, "].");
    return LLMCB_DONE;
}

static llmcbi_work *llmcbi_agent_invalid(llmcbi_agent *g,
                                         const llmcb_tool_call *call,
                                         const llmcb_config *config)
{
    static const llmcb_tool tool = { "invalid_tool",
                                     "Called when a tool's name is not valid.",
                                     NULL,
                                     NULL,
                                     llmcbi_invalid_tool_step,
                                     0,
                                     0,
                                     false,
                                     NULL };
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    llmcb_tool_call instead = *call;
    llmcb_agent_desc d = g->d;
    llmcbi_buf names, arguments;
    llmcbi_work *w = NULL;
    llmcb_str known;
    size_t i;

    d.approve = NULL; /* nothing is called */
    memset(&names, 0, sizeof names);
    memset(&arguments, 0, sizeof arguments);
    for (i = 0; i < g->d.n_tools; i++) {
        if (i) llmcbi_buf_text(a, &names, ", ");
        llmcbi_buf_text(a, &names, g->d.tools[i].name);
    }
    known = llmcbi_buf_str(&names);
    llmcbi_buf_print(a, &arguments,
                     "{\"requested_tool_name\":\"%J\","
                     "\"available_tool_names\":\"%J\"}",
                     &call->name, &known);
    instead.arguments = llmcbi_buf_str(&arguments);
    if (!names.failed && !arguments.failed)
        w = llmcbi_tool_new(g->w->op.loop, &tool, &instead, &d, config);
    llmcbi_buf_free(a, &names);
    llmcbi_buf_free(a, &arguments);
    return w;
}

/* Starts the tools of this turn. */
static llmcb_code llmcbi_agent_call(llmcbi_agent *g)
{
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    llmcb_config config = llmcb_run_child(&g->w->run.pub, NULL);
    size_t i, k, n = g->n_calls;

    g->tools = (llmcb_op **)llmcbi_alloc(a, n * sizeof *g->tools);
    g->waiting = (llmcb_op **)llmcbi_alloc(a, n * sizeof *g->waiting);
    if (!g->tools || !g->waiting) return LLMCB_ENOMEM;
    for (i = 0; i < n; i++) {
        const llmcb_tool_call *call = &g->calls[i];
        llmcbi_work *w;
        for (k = 0; k < g->d.n_tools; k++)
            if (llmcbi_str_is(call->name, g->d.tools[k].name)) break;
        w = k < g->d.n_tools ? llmcbi_tool_new(g->w->op.loop, &g->d.tools[k],
                                               call, &g->d, &config)
                             : llmcbi_agent_invalid(g, call, &config);
        if (!w) return LLMCB_ENOMEM;
        g->tools[i] = g->waiting[g->n_waiting++] = &w->op;
    }
    return LLMCB_OK;
}

/* The id of a call, for the model: servers that give none get a number. */
static llmcb_str llmcbi_agent_id(llmcbi_agent *g, size_t i)
{
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    char text[40] = "call_", digits[24];

    if (g->calls[i].id.len)
        return llmcbi_arena_str(a, &g->arena, g->calls[i].id);
    strcat(text, llmcbi_decimal(digits, (int64_t)(g->n + i)));
    return llmcb_text(llmcbi_arena_copy(a, &g->arena, text));
}

/* Adds what the model said, and the tools in the order of the calls. */
static llmcb_code llmcbi_agent_hear(llmcbi_agent *g)
{
    const llmcb_allocator *a = llmcbi_agent_alloc(g);
    size_t i, n = g->n_calls;
    llmcb_tool_call *calls =
        (llmcb_tool_call *)llmcbi_arena_get(a, &g->arena, n * sizeof *calls);
    llmcb_message *m;

    if (!calls || !llmcbi_agent_grow(g, n + 1)) return LLMCB_ENOMEM;
    for (i = 0; i < n; i++) {
        const llmcb_tool_call *from = &g->calls[i];
        calls[i].id = llmcbi_agent_id(g, i);
        calls[i].name = llmcbi_arena_str(a, &g->arena, from->name);
        calls[i].arguments = llmcbi_arena_str(a, &g->arena, from->arguments);
        calls[i].valid = from->valid;
    }
    m = llmcbi_agent_say(g, LLMCB_ASSISTANT, llmcb_op_text(g->ask));
    m->tool_calls = calls;
    m->n_tool_calls = n;
    for (i = 0; i < n; i++) {
        m = llmcbi_agent_say(g, LLMCB_TOOL, llmcb_op_output(g->tools[i])->text);
        m->tool_call_id = calls[i].id.ptr;
    }
    llmcbi_agent_drop_tools(g);
    if (!g->arena.failed) return LLMCB_OK;
    g->n -= n + 1; /* lengths without their text */
    return LLMCB_ENOMEM;
}

/* It did not come to an answer, but ends in good order: first what is still
 * under way. */
static void llmcbi_agent_stop(llmcbi_agent *g, llmcb_code code)
{
    llmcb_error e;

    llmcbi_error_set(&e, code,
                     code == LLMCB_ELIMIT
                         ? "the agent made max_turns calls of the "
                           "model and came to no answer"
                         : "the agent took longer than total_ms");
    if (code == LLMCB_ETIMEDOUT) e.detail = LLMCB_DETAIL_TOTAL;
    g->w->late = llmcbi_error_keep(llmcbi_agent_alloc(g), &e);
}

/* One of those that are still under way, cancelled; NULL: there is none. They
 * may become more meanwhile. */
static llmcb_op *llmcbi_agent_rest(llmcbi_agent *g)
{
    llmcb_op *child, *last = NULL;

    for (child = llmcbi_op_at(g->w->op.children); child;
         child = llmcbi_op_at(child->sibling.next))
        if (child != g->w->body) {
            const llmcbi_work *w = llmcbi_work_of(child);
            if (!w || !w->run.skipping) /* it may be cleaning up */
                llmcbi_op_want_cancel(child, LLMCB_DETAIL_PARENT);
            last = child;
        }
    return last;
}

static int64_t llmcbi_agent_left(const llmcbi_agent *g)
{
    int64_t past = g->w->op.loop->now - g->began;

    if (g->d.total_ms <= 0) return -1;
    return past < g->d.total_ms ? g->d.total_ms - past : 0;
}

/* As llmcb_await_run; while another coroutine awaits the same, which would be
 * LLMCB_EBUSY, it looks again later. */
static llmcb_step llmcbi_agent_flush(llmcb_task *t, llmcbi_agent *g)
{
    return g->w->run.flusher ? llmcb_sleep(t, 1)
                             : llmcb_await_run(t, &g->w->run.pub);
}

static llmcb_step llmcbi_agent_finish(llmcbi_agent *g, llmcb_str text)
{
    llmcb_code code = llmcb_run_agent_finish(&g->w->run.pub, text, text);

    if (code == LLMCB_OK) code = llmcb_run_end(&g->w->run.pub, text);
    return code;
}

static llmcb_step llmcbi_agent_body(llmcb_task *t)
{
    llmcbi_agent *g = (llmcbi_agent *)t->self;
    llmcb_op *rest;
    llmcb_code code;

    LLMCB_BEGIN(t);
    g->began = g->w->op.loop->now;
    for (; g->turns < g->d.max_turns; g->turns++) {
        code = llmcbi_agent_ask(g);
        if (!g->ask) return code;
        LLMCB_AWAIT(t, llmcb_await_any(t, &g->ask, 1, llmcbi_agent_left(g)));
        if (g->w->outcome) return LLMCB_ECANCELLED;
        if (!g->ask->done && t->result != LLMCB_ETIMEDOUT) return t->result;
        if (!g->ask->done) break;
        llmcbi_agent_answered(g);
        LLMCB_AWAIT(t, llmcb_await(t, g->turn));
        if (g->w->outcome) return LLMCB_ECANCELLED;
        if (g->turn->error->code != LLMCB_OK)
            return llmcbi_agent_fail(g, g->turn->error);
        if (g->ask->error->code != LLMCB_OK) /* the program ended the turn */
            return llmcbi_agent_fail(g, g->ask->error);
        for (g->i = 0; g->i < g->n_calls;) {
            code = llmcbi_agent_act(g, g->i);
            if (code == LLMCB_OK)
                g->i++;
            else if (code != LLMCB_EBUSY)
                return code;
            else
                LLMCB_AWAIT(t, llmcbi_agent_flush(t, g));
        }
        g->told = g->w->run.head;
        do
            LLMCB_AWAIT(t, llmcbi_agent_flush(t, g));
        while (!g->w->outcome && g->w->run.slowest < g->told);
        if (g->w->outcome) return LLMCB_ECANCELLED;
        if (!g->n_calls) return llmcbi_agent_finish(g, llmcb_op_text(g->ask));
        code = llmcbi_agent_call(g);
        if (code != LLMCB_OK) return code;
        while (g->n_waiting) {
            LLMCB_AWAIT(t, llmcb_await_any(t, g->waiting, g->n_waiting,
                                           llmcbi_agent_left(g)));
            if (g->w->outcome) return LLMCB_ECANCELLED;
            if (t->index >= g->n_waiting) {
                if (t->result != LLMCB_ETIMEDOUT) return t->result;
                break;
            }
            if (g->waiting[t->index]->error->code != LLMCB_OK)
                return llmcbi_agent_fail_by(g, g->waiting[t->index]);
            g->waiting[t->index] = g->waiting[--g->n_waiting];
        }
        if (g->n_waiting) break;
        code = llmcbi_agent_hear(g);
        if (code != LLMCB_OK) return code;
    }
    llmcbi_agent_stop(g, g->turns == g->d.max_turns ? LLMCB_ELIMIT
                                                    : LLMCB_ETIMEDOUT);
    while ((rest = llmcbi_agent_rest(g)) != NULL) {
        LLMCB_AWAIT(t, llmcb_await(t, rest));
        if (g->w->outcome) return LLMCB_ECANCELLED;
    }
    while (!g->w->outcome && !llmcbi_run_fits(&g->w->run))
        LLMCB_AWAIT(t, llmcbi_agent_flush(t, g));
    return llmcbi_agent_finish(
        g, llmcb_text("The agent stopped: it reached its limit of turns or "
                      "of time."));
    LLMCB_END(t);
}

/* The agent of a run that has begun. false: no memory. */
static bool llmcbi_agent_init(llmcbi_agent *g, llmcbi_work *w,
                              const llmcb_agent_desc *desc,
                              const llmcb_message *messages, size_t n,
                              const llmcb_config *config)
{
    const llmcb_allocator *a = &w->op.loop->alloc;
    size_t i;

    g->w = w;
    g->d = *desc;
    if (g->d.max_turns <= 0) g->d.max_turns = 15;
    g->usage.known = true;
    w->d.self = g;
    w->freed = llmcbi_agent_freed;
    w->op.usage = &g->usage;
    llmcbi_agent_extra(g, config ? config->extra : NULL);
    if (!llmcbi_agent_grow(g, n)) return false;
    for (i = 0; i < n; i++)
        llmcbi_message_copy(a, &g->arena, &g->messages[i], &messages[i]);
    if (g->arena.failed) return false; /* lengths without their text */
    g->n = n;
    return !g->extra.failed;
}

static const char *llmcbi_agent_wrong(const llmcb_agent_desc *d,
                                      const llmcb_message *messages, size_t n,
                                      const llmcb_config *config)
{
    const char *why;
    size_t i, k;

    if (d->n_tools && !d->tools) return "the list of tools is NULL";
    for (i = 0; i < d->n_tools; i++) {
        why = llmcbi_tool_wrong(&d->tools[i]);
        if (why) return why;
        for (k = 0; k < i; k++)
            if (strcmp(d->tools[i].name, d->tools[k].name) == 0)
                return "two tools have the same name";
    }
    if (!n || !messages) return "there is no message";
    for (i = 0; i < n; i++)
        if (llmcbi_message_check(&messages[i], &why) != LLMCB_OK) return why;
    if (config && !llmcbi_json_text_is(config->extra, LLMCBI_JSON_OBJECT))
        return "extra of the configuration is not a JSON object";
    return NULL;
}

LLMCBI_DEF llmcb_op *llmcb_agent_start(const llmcb_agent_desc *desc,
                                       const llmcb_message *messages, size_t n,
                                       const llmcb_config *config)
{
    const char *wrong;
    llmcb_run_desc d;
    llmcbi_agent *g;
    llmcbi_work *w;

    if (!desc || !desc->chat) return NULL;
    wrong = llmcbi_agent_wrong(desc, messages, n, config);
    memset(&d, 0, sizeof d);
    d.name = "AgentExecutor";
    d.body = llmcbi_agent_body;
    d.handler_ms = desc->handler_ms;
    if (!wrong) {
        const llmcb_message *last = &messages[n - 1];
        d.input = llmcbi_slice(last->content, last->content_len);
        if (!d.input.len) d.input = llmcb_text(last->content);
    }
    w = llmcbi_work_new(desc->chat->loop, &d, config, wrong);
    if (!w || w->op.done) return w ? &w->op : NULL;
    g = (llmcbi_agent *)llmcbi_alloc(&w->op.loop->alloc, sizeof *g);
    if (!g || !llmcbi_agent_init(g, w, desc, messages, n, config))
        llmcbi_work_fail(w, LLMCB_ENOMEM, NULL);
    return &w->op;
}

LLMCBI_DEF const llmcb_message *llmcb_agent_messages(const llmcb_op *op,
                                                     size_t *n)
{
    const llmcbi_work *w = llmcbi_work_of(op);
    const llmcbi_agent *g = NULL;

    if (w && w->freed == llmcbi_agent_freed && op->done)
        g = (const llmcbi_agent *)w->d.self;
    if (n) *n = g ? g->n : 0;
    return g ? g->messages : NULL;
}
#endif /* LLMCB_NO_AGENT */

/* ==== [KIT] ready-made handlers ======================================== */

#ifndef LLMCB_NO_KIT

/* What an open run of a timing handler has seen. */
typedef struct llmcbi_pace {
    struct llmcbi_pace *next;
    char id[37];
    llmcb_timing so_far;
    int64_t first, last; /* on the loop's clock */
} llmcbi_pace;

typedef struct llmcbi_tally {
    char *model;
    llmcb_usage usage;
} llmcbi_tally;

/* All of them; each uses what it needs. */
typedef struct llmcbi_kit {
    llmcb_handler h; /* first */
    llmcb_allocator alloc;
    pthread_mutex_t mutex; /* of what follows; several loops may share it */
    int fd;                /* -1: none */
    bool content, raw;
    bool full; /* the file could not be written, which was told */
    llmcbi_buf line;
    llmcbi_tally *tallies;
    size_t n_tallies, tallies_cap;
    llmcb_run_record *records;
    size_t n_records, records_cap;
    llmcbi_pace *paces;
    llmcb_timing timing;
#ifndef LLMCB_NO_STDIO
    FILE *out, *owned;
#endif
} llmcbi_kit;

static llmcbi_kit *llmcbi_kit_new(llmcb_loop *loop, const char *name)
{
    llmcbi_kit *k;

    if (!loop) return NULL;
    k = (llmcbi_kit *)llmcbi_alloc(&loop->alloc, sizeof *k);
    if (!k) return NULL;
    k->alloc = loop->alloc;
    k->h.name = name;
    k->fd = -1;
    if (pthread_mutex_init(&k->mutex, NULL) == 0) return k;
    llmcbi_free(&loop->alloc, k, sizeof *k);
    return NULL;
}

static void llmcbi_text_free(const llmcb_allocator *a, const char *s)
{
    if (s) llmcbi_free(a, llmcbi_unconst(s), strlen(s) + 1);
}

/* A copy that ends at the first NUL, as the allocator is told its size. */
static char *llmcbi_text_copy(const llmcb_allocator *a, const char *s)
{
    size_t n = strlen(s) + 1;
    char *copy = (char *)llmcbi_resize(a, NULL, 0, n);

    if (copy) memcpy(copy, s, n);
    return copy;
}

static void llmcbi_record_drop(llmcbi_kit *k, size_t i)
{
    llmcbi_text_free(&k->alloc, k->records[i].name);
    llmcbi_text_free(&k->alloc, k->records[i].output);
    memmove(&k->records[i], &k->records[i + 1],
            (--k->n_records - i) * sizeof *k->records);
}

LLMCBI_DEF void llmcb_handler_free(llmcb_handler *h)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    llmcb_allocator a;

    if (!k) return;
    a = k->alloc;
    while (k->n_records)
        llmcbi_record_drop(k, k->n_records - 1);
    while (k->n_tallies)
        llmcbi_text_free(&a, k->tallies[--k->n_tallies].model);
    while (k->paces) {
        llmcbi_pace *p = k->paces;
        k->paces = p->next;
        llmcbi_free(&a, p, sizeof *p);
    }
    llmcbi_free(&a, k->records, k->records_cap * sizeof *k->records);
    llmcbi_free(&a, k->tallies, k->tallies_cap * sizeof *k->tallies);
    llmcbi_buf_free(&a, &k->line);
    if (k->fd >= 0) LLMCBI_SYS(close)(k->fd);
#ifndef LLMCB_NO_STDIO
    if (k->owned) fclose(k->owned);
#endif
    pthread_mutex_destroy(&k->mutex);
    llmcbi_free(&a, k, sizeof *k);
}

/* One more place in an array. */
static bool llmcbi_kit_grow(llmcbi_kit *k, void **array, size_t size, size_t n,
                            size_t *cap)
{
    size_t more = *cap ? 2 * *cap : 8;
    void *grown;

    if (n < *cap) return true;
    grown = llmcbi_resize(&k->alloc, *array, *cap * size, more * size);
    if (!grown) return false;
    *array = grown;
    *cap = more;
    return true;
}

/* Fills the same function into the places of a table. */
static void llmcbi_kit_starts(llmcb_sync_table *t, llmcb_sync_fn fn)
{
    t->on_chat_model_start = fn;
    t->on_chain_start = t->on_tool_start = t->on_retriever_start = fn;
}

static void llmcbi_kit_finishes(llmcb_sync_table *t, llmcb_sync_fn fn)
{
    t->on_llm_end = t->on_llm_error = fn;
    t->on_chain_end = t->on_chain_error = fn;
    t->on_tool_end = t->on_tool_error = fn;
    t->on_retriever_end = t->on_retriever_error = fn;
}

static bool llmcbi_kit_is_start(llmcb_event_kind kind)
{
    return kind == LLMCB_CHAT_MODEL_START || kind == LLMCB_CHAIN_START ||
           kind == LLMCB_TOOL_START || kind == LLMCB_RETRIEVER_START;
}

/* -- usage by model */

static llmcbi_tally *llmcbi_usage_find(const llmcbi_kit *k, const char *model)
{
    size_t i;

    for (i = 0; i < k->n_tallies; i++)
        if (strcmp(k->tallies[i].model, model) == 0) return &k->tallies[i];
    return NULL;
}

static llmcbi_tally *llmcbi_usage_open(llmcbi_kit *k, const char *model)
{
    void *array = k->tallies;
    llmcbi_tally *t = llmcbi_usage_find(k, model);

    if (t) return t;
    if (!llmcbi_kit_grow(k, &array, sizeof *t, k->n_tallies, &k->tallies_cap))
        return NULL;
    k->tallies = (llmcbi_tally *)array;
    t = &k->tallies[k->n_tallies];
    memset(t, 0, sizeof *t);
    t->usage.known = true;
    t->model = llmcbi_text_copy(&k->alloc, model);
    if (!t->model) return NULL;
    k->n_tallies++;
    return t;
}

static int llmcbi_usage_told(llmcb_handler *h, const llmcb_event *ev)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    const llmcb_result *r = ev->result;
    llmcbi_tally *t;

    /* an error that brought no usage has most likely cost nothing */
    if (r->cached || (ev->kind == LLMCB_LLM_ERROR && !r->usage.known)) return 0;
    pthread_mutex_lock(&k->mutex);
    t = llmcbi_usage_open(k, r->model_name.ptr);
    if (t) llmcbi_usage_add(&t->usage, &r->usage);
    pthread_mutex_unlock(&k->mutex);
    return t ? 0 : LLMCB_ENOMEM;
}

LLMCBI_DEF llmcb_handler *llmcb_usage_handler(llmcb_loop *loop)
{
    llmcbi_kit *k = llmcbi_kit_new(loop, "usage");

    if (!k) return NULL;
    k->h.flags = LLMCB_INLINE;
    k->h.sync.on_llm_end = k->h.sync.on_llm_error = llmcbi_usage_told;
    return &k->h;
}

LLMCBI_DEF llmcb_usage llmcb_usage_of(llmcb_handler *h, const char *model)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    llmcb_usage sum;
    size_t i, n = 0;

    memset(&sum, 0, sizeof sum);
    if (!k) return sum;
    pthread_mutex_lock(&k->mutex);
    for (i = 0; i < k->n_tallies; i++) {
        if (model && strcmp(model, k->tallies[i].model) != 0) continue;
        if (!n++) sum.known = true;
        llmcbi_usage_add(&sum, &k->tallies[i].usage);
    }
    pthread_mutex_unlock(&k->mutex);
    return sum;
}

LLMCBI_DEF const char *llmcb_usage_model(llmcb_handler *h, size_t i)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    const char *model = NULL;

    if (!k) return NULL;
    pthread_mutex_lock(&k->mutex);
    if (i < k->n_tallies) model = k->tallies[i].model;
    pthread_mutex_unlock(&k->mutex);
    return model;
}

/* -- runs: collected, and printed as a tree */

/* The open one with this id. */
static llmcb_run_record *llmcbi_record_find(const llmcbi_kit *k, const char *id)
{
    size_t i = k->n_records; /* it is most likely one of the last */

    while (i--)
        if (!k->records[i].finished && strcmp(k->records[i].id, id) == 0)
            return &k->records[i];
    return NULL;
}

static bool llmcbi_record_begin(llmcbi_kit *k, const llmcb_event *ev)
{
    void *array = k->records;
    llmcb_run_record *r;

    if (!llmcbi_kit_grow(k, &array, sizeof *r, k->n_records, &k->records_cap))
        return false;
    k->records = (llmcb_run_record *)array;
    r = &k->records[k->n_records];
    memset(r, 0, sizeof *r);
    memcpy(r->id, ev->run->id, sizeof r->id);
    memcpy(r->parent_id, ev->run->parent_id, sizeof r->parent_id);
    r->kind = ev->kind;
    r->started_ms = ev->run->started_ms;
    r->name = llmcbi_text_copy(&k->alloc, ev->run->name);
    if (!r->name) return false;
    k->n_records++;
    return true;
}

static void llmcbi_record_finish(llmcbi_kit *k, llmcb_run_record *r,
                                 const llmcb_event *ev)
{
    const char *text = "";

    r->finished = true;
    r->finished_ms = ev->run->finished_ms;
    r->code = ev->error ? ev->error->code : LLMCB_OK;
    if (ev->result) {
        r->usage = ev->result->usage;
        r->cached = ev->result->cached;
        if (ev->result->n_generations)
            text = ev->result->generations[0].text.ptr;
    }
    if (ev->error)
        text = ev->error->message;
    else if (ev->output)
        text = ev->output->text.ptr;
    if (k->content) r->output = llmcbi_text_copy(&k->alloc, text);
}

#ifndef LLMCB_NO_STDIO
/* Only what has started before it, so that ids which the program has chosen
 * badly make no circle. */
static llmcb_run_record *llmcbi_record_parent(const llmcbi_kit *k,
                                              const llmcb_run_record *r)
{
    size_t i = (size_t)(r - k->records);

    while (i--)
        if (strcmp(k->records[i].id, r->parent_id) == 0) return &k->records[i];
    return NULL;
}

/* The first child of `parent` behind `r`. */
static size_t llmcbi_tree_child(const llmcbi_kit *k, const llmcb_run_record *r,
                                const llmcb_run_record *parent)
{
    size_t i = (size_t)(r - k->records) + 1;

    while (i < k->n_records &&
           (strcmp(k->records[i].parent_id, parent->id) != 0 ||
            llmcbi_record_parent(k, &k->records[i]) != parent))
        i++;
    return i;
}

/* The lines that lead to a record from its ancestors below the root, from
 * right to left. */
static void llmcbi_tree_lead(llmcbi_kit *k, const llmcb_run_record *root,
                             const llmcb_run_record *r)
{
    char lead[4 * 32 + 1], *at = lead + sizeof lead - 1;
    bool own = true;

    *at = '\0';
    while (r != root && at - lead >= 4) {
        const llmcb_run_record *parent = llmcbi_record_parent(k, r);
        bool more = llmcbi_tree_child(k, r, parent) < k->n_records;
        at -= 4;
        memcpy(at, own ? more ? "|-- " : "`-- " : more ? "|   " : "    ", 4);
        own = false;
        r = parent;
    }
    fputs(at, k->out);
}

static void llmcbi_tree_line(llmcbi_kit *k, const llmcb_run_record *root,
                             const llmcb_run_record *r)
{
    char a[24], b[24];
    int64_t ms = r->finished_ms - r->started_ms;

    llmcbi_tree_lead(k, root, r);
    llmcb_str_print(llmcb_text(r->name), k->out);
    if (!r->finished)
        fputs("  not finished", k->out);
    else if (ms < 1000)
        fprintf(k->out, "  %s ms", llmcbi_decimal(a, ms));
    else
        fprintf(k->out, "  %s.%s s", llmcbi_decimal(a, ms / 1000),
                llmcbi_decimal(b, ms % 1000 / 100));
    if (r->usage.known)
        fprintf(k->out, ", %s + %s tokens",
                llmcbi_decimal(a, r->usage.input_tokens),
                llmcbi_decimal(b, r->usage.output_tokens));
    if (r->cached) fputs(", cached", k->out);
    if (r->code != LLMCB_OK) fprintf(k->out, "  %s", llmcb_code_name(r->code));
    fputs("\n", k->out);
}

/* Prints the tree under a root, depth first, and forgets it. */
static void llmcbi_tree_print(llmcbi_kit *k, const llmcb_run_record *root)
{
    size_t i, first = (size_t)(root - k->records);
    const llmcb_run_record *r = root;

    while (r) {
        const llmcb_run_record *up = r;
        llmcbi_tree_line(k, root, r);
        i = llmcbi_tree_child(k, r, r);
        while (i == k->n_records && up != root) {
            const llmcb_run_record *parent = llmcbi_record_parent(k, up);
            i = llmcbi_tree_child(k, up, parent);
            up = parent;
        }
        r = i < k->n_records ? &k->records[i] : NULL;
    }
    fflush(k->out);
    for (i = k->n_records; i-- > first;) { /* parents after children */
        const llmcb_run_record *p = &k->records[i];
        while (p && p != &k->records[first])
            p = llmcbi_record_parent(k, p);
        if (p) llmcbi_record_drop(k, i);
    }
}

#endif

static int llmcbi_record_told(llmcb_handler *h, const llmcb_event *ev)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    llmcb_run_record *r;
    bool ok = true;

    pthread_mutex_lock(&k->mutex);
    if (llmcbi_kit_is_start(ev->kind)) {
        ok = llmcbi_record_begin(k, ev);
    } else if ((r = llmcbi_record_find(k, ev->run->id)) != NULL) {
        if (ev->kind == LLMCB_LLM_NEW_TOKEN)
            r->tokens += ev->token->text.len > 0;
        else
            llmcbi_record_finish(k, r, ev);
#ifndef LLMCB_NO_STDIO
        if (k->out && r->finished && !llmcbi_record_parent(k, r))
            llmcbi_tree_print(k, r);
#endif
    }
    pthread_mutex_unlock(&k->mutex);
    return ok ? 0 : LLMCB_ENOMEM;
}

LLMCBI_DEF llmcb_handler *llmcb_collector(llmcb_loop *loop)
{
    llmcbi_kit *k = llmcbi_kit_new(loop, "collector");

    if (!k) return NULL;
    k->content = true;
    k->h.flags = LLMCB_INLINE;
    llmcbi_kit_starts(&k->h.sync, llmcbi_record_told);
    llmcbi_kit_finishes(&k->h.sync, llmcbi_record_told);
    k->h.sync.on_llm_new_token = llmcbi_record_told;
    return &k->h;
}

LLMCBI_DEF const llmcb_run_record *llmcb_collector_runs(llmcb_handler *h,
                                                        size_t *n)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    const llmcb_run_record *records;

    if (n) *n = 0;
    if (!k) return NULL;
    pthread_mutex_lock(&k->mutex);
    records = k->records;
    if (n) *n = k->n_records;
    pthread_mutex_unlock(&k->mutex);
    return records;
}

LLMCBI_DEF void llmcb_collector_clear(llmcb_handler *h)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    size_t i;

    if (!k) return;
    pthread_mutex_lock(&k->mutex);
    for (i = k->n_records; i-- > 0;)
        if (k->records[i].finished) llmcbi_record_drop(k, i);
    pthread_mutex_unlock(&k->mutex);
}

#ifndef LLMCB_NO_STDIO
LLMCBI_DEF llmcb_handler *llmcb_tree_handler(llmcb_loop *loop, FILE *out)
{
    llmcbi_kit *k = out ? llmcbi_kit_new(loop, "tree") : NULL;

    if (!k) return NULL;
    k->out = out;
    llmcbi_kit_starts(&k->h.sync, llmcbi_record_told);
    llmcbi_kit_finishes(&k->h.sync, llmcbi_record_told);
    return &k->h;
}

/* -- text for people */

static void llmcbi_kit_put(llmcbi_kit *k, llmcb_str s)
{
    if (k->raw)
        fwrite(s.ptr, 1, s.len, k->out);
    else
        llmcb_str_print(s, k->out);
}

static int llmcbi_stdout_token(llmcb_handler *h, const llmcb_event *ev)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;

    if (!ev->token->text.len) return 0;
    pthread_mutex_lock(&k->mutex);
    llmcbi_kit_put(k, ev->token->text);
    fflush(k->out);
    pthread_mutex_unlock(&k->mutex);
    return ferror(k->out) ? LLMCB_EIO : 0;
}

LLMCBI_DEF llmcb_handler *llmcb_token_handler(llmcb_loop *loop, FILE *out,
                                              bool raw)
{
    llmcbi_kit *k = out ? llmcbi_kit_new(loop, "tokens") : NULL;

    if (!k) return NULL;
    k->out = out;
    k->raw = raw;
    k->h.sync.on_llm_new_token = llmcbi_stdout_token;
    return &k->h;
}

static int llmcbi_file_told(llmcb_handler *h, const llmcb_event *ev)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    llmcb_str name = llmcb_text(ev->run->name);
    bool failed;

    pthread_mutex_lock(&k->mutex);
    clearerr(k->out); /* it is the handler's own: of this event only */
    switch (ev->kind) {
    case LLMCB_CHAIN_START:
        fputs("> Entering ", k->out);
        llmcbi_kit_put(k, name);
        break;
    case LLMCB_CHAIN_END:
        fputs("> Finished ", k->out);
        llmcbi_kit_put(k, name);
        break;
    case LLMCB_TOOL_END:
        llmcbi_kit_put(k, name);
        fputs(": ", k->out);
        llmcbi_kit_put(k, ev->output->text);
        break;
    case LLMCB_AGENT_ACTION:
        fputs("Action: ", k->out);
        llmcbi_kit_put(k, ev->action->tool);
        fputs(" ", k->out);
        llmcbi_kit_put(k, ev->action->input);
        break;
    case LLMCB_AGENT_FINISH: llmcbi_kit_put(k, ev->output->log); break;
    case LLMCB_TEXT: llmcbi_kit_put(k, ev->data->text); break;
    default: /* an error */
        llmcbi_kit_put(k, name);
        fputs(": ", k->out);
        fputs(ev->error->message, k->out);
        break;
    }
    fputs("\n", k->out);
    fflush(k->out);
    failed = ferror(k->out) != 0;
    pthread_mutex_unlock(&k->mutex);
    return failed ? LLMCB_EIO : 0;
}

/* It has no file; errno stays what it is, whatever the allocator does. */
static llmcb_handler *llmcbi_kit_refused(llmcbi_kit *k)
{
    int saved = errno;

    llmcb_handler_free(&k->h);
    errno = saved;
    return NULL;
}

LLMCBI_DEF llmcb_handler *llmcb_file_handler(llmcb_loop *loop, const char *path)
{
    llmcbi_kit *k = llmcbi_kit_new(loop, "file");
    llmcb_sync_table *t;
    int fd = -1;

    if (!k) return NULL;
    if (path) fd = llmcbi_open_file(path, LLMCBI_APPEND);
    if (fd >= 0) k->out = k->owned = fdopen(fd, "a");
    if (!k->out) {
        k->fd = fd;
        return llmcbi_kit_refused(k);
    }
    t = &k->h.sync;
    t->on_chain_start = t->on_chain_end = t->on_chain_error = llmcbi_file_told;
    t->on_tool_end = t->on_tool_error = t->on_llm_error = llmcbi_file_told;
    t->on_retriever_error = t->on_text = llmcbi_file_told;
    t->on_agent_action = t->on_agent_finish = llmcbi_file_told;
    return &k->h;
}
/* -- a trace, one JSON object a line */

/* A JSON string of text that may not be UTF-8. */
static void llmcbi_jsonl_quote(llmcbi_kit *k, llmcb_str s)
{
    const llmcb_allocator *a = &k->alloc;
    llmcbi_carry c;
    char piece[12], *end;
    size_t i;

    llmcbi_buf_add(a, &k->line, "\"", 1);
    if (llmcbi_utf8_valid(s.ptr, s.len)) {
        llmcbi_json_escape(a, &k->line, s.ptr, s.len);
    } else {
        memset(&c, 0, sizeof c);
        for (i = 0; i < s.len; i++) {
            end = llmcbi_put_byte(piece, &c, (unsigned char)s.ptr[i]);
            llmcbi_json_escape(a, &k->line, piece, (size_t)(end - piece));
        }
        end = llmcbi_carry_flush(piece, &c);
        llmcbi_json_escape(a, &k->line, piece, (size_t)(end - piece));
    }
    llmcbi_buf_add(a, &k->line, "\"", 1);
}

static void llmcbi_jsonl_text(llmcbi_kit *k, const char *name, llmcb_str s)
{
    llmcbi_buf_text(&k->alloc, &k->line, ",\"");
    llmcbi_buf_text(&k->alloc, &k->line, name);
    llmcbi_buf_text(&k->alloc, &k->line, "\":");
    llmcbi_jsonl_quote(k, s);
}

static void llmcbi_jsonl_int(llmcbi_kit *k, const char *name, int64_t v)
{
    llmcbi_buf_print(&k->alloc, &k->line, ",\"%s\":%d", name, v);
}

/* What was said, or only how long it was. */
static void llmcbi_jsonl_content(llmcbi_kit *k, const char *name, llmcb_str s)
{
    if (k->content)
        llmcbi_jsonl_text(k, name, s);
    else
        llmcbi_jsonl_int(k, "bytes", (int64_t)s.len);
}

static void llmcbi_jsonl_start(llmcbi_kit *k, const llmcb_event *ev)
{
    const llmcb_allocator *a = &k->alloc;
    const llmcb_run *run = ev->run;
    size_t i;

    llmcbi_jsonl_text(k, "name", llmcb_text(run->name));
    for (i = 0; i < run->n_tags; i++) {
        llmcbi_buf_text(a, &k->line, i ? "," : ",\"tags\":[");
        llmcbi_jsonl_quote(k, llmcb_text(run->tags[i]));
    }
    if (i) llmcbi_buf_text(a, &k->line, "]");
    for (i = 0; i < run->n_metadata; i++) {
        llmcbi_buf_text(a, &k->line, i ? "," : ",\"metadata\":{");
        llmcbi_jsonl_quote(k, llmcb_text(run->metadata[i].key));
        llmcbi_buf_text(a, &k->line, ":");
        llmcbi_jsonl_quote(k, llmcb_text(run->metadata[i].value));
    }
    if (i) llmcbi_buf_text(a, &k->line, "}");
    if (*ev->start->model)
        llmcbi_jsonl_text(k, "model", llmcb_text(ev->start->model));
    if (ev->kind == LLMCB_CHAT_MODEL_START)
        llmcbi_jsonl_content(k, "prompt", ev->start->prompt);
    else
        llmcbi_jsonl_content(k, "input", ev->start->input);
}

static void llmcbi_jsonl_result(llmcbi_kit *k, const llmcb_result *r)
{
    if (r->n_generations) {
        llmcbi_jsonl_content(k, "text", r->generations[0].text);
        llmcbi_jsonl_text(k, "finish_reason", r->generations[0].finish_reason);
        llmcbi_jsonl_int(k, "tool_calls",
                         (int64_t)r->generations[0].n_tool_calls);
    }
    llmcbi_jsonl_text(k, "model", r->model_name);
    if (r->usage.known) {
        llmcbi_jsonl_int(k, "input_tokens", r->usage.input_tokens);
        llmcbi_jsonl_int(k, "output_tokens", r->usage.output_tokens);
    }
    if (r->cached) llmcbi_buf_text(&k->alloc, &k->line, ",\"cached\":true");
}

static void llmcbi_jsonl_payload(llmcbi_kit *k, const llmcb_event *ev)
{
    const llmcb_error *e = ev->retry ? ev->retry->error : ev->error;

    if (ev->start) llmcbi_jsonl_start(k, ev);
    if (ev->token) llmcbi_jsonl_content(k, "text", ev->token->text);
    if (ev->result) llmcbi_jsonl_result(k, ev->result);
    if (ev->output) {
        llmcbi_jsonl_content(k, "output", ev->output->text);
        if (ev->output->documents)
            llmcbi_jsonl_int(k, "documents", (int64_t)ev->output->n_documents);
        if (ev->output->failed)
            llmcbi_buf_text(&k->alloc, &k->line, ",\"failed\":true");
    }
    if (ev->action) {
        llmcbi_jsonl_text(k, "tool", ev->action->tool);
        llmcbi_jsonl_content(k, "input", ev->action->input);
    }
    if (ev->data) {
        if (ev->data->name.len) llmcbi_jsonl_text(k, "name", ev->data->name);
        llmcbi_jsonl_content(k, "data", ev->data->text);
    }
    if (ev->retry) {
        llmcbi_jsonl_int(k, "attempt", ev->retry->attempt);
        llmcbi_jsonl_int(k, "delay_ms", ev->retry->delay_ms);
    }
    if (e) {
        llmcbi_jsonl_text(k, "code", llmcb_text(llmcb_code_name(e->code)));
        llmcbi_jsonl_text(k, "message", llmcb_text(e->message));
        if (e->http_status) llmcbi_jsonl_int(k, "http_status", e->http_status);
    }
    if (ev->skipped) llmcbi_jsonl_int(k, "skipped", (int64_t)ev->skipped);
}

static bool llmcbi_write_all(int fd, const char *p, size_t n)
{
    while (n) {
        ssize_t done = LLMCBI_SYS(write)(fd, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        p += done;
        n -= (size_t)done;
    }
    return true;
}

static int llmcbi_jsonl_told(llmcb_handler *h, const llmcb_event *ev)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    struct timespec ts;
    bool failed;

    LLMCBI_SYS(clock_gettime)(CLOCK_REALTIME, &ts);
    pthread_mutex_lock(&k->mutex);
    if (k->full) { /* a line may be cut: nothing can follow it */
        pthread_mutex_unlock(&k->mutex);
        return 0;
    }
    k->line.len = 0;
    llmcbi_buf_text(&k->alloc, &k->line, "{\"event\":\"");
    llmcbi_buf_text(&k->alloc, &k->line, llmcb_event_name(ev->kind));
    llmcbi_buf_text(&k->alloc, &k->line, "\"");
    llmcbi_jsonl_int(k, "time_ms",
                     (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000);
    llmcbi_jsonl_text(k, "run_id", llmcb_text(ev->run->id));
    if (*ev->run->parent_id)
        llmcbi_jsonl_text(k, "parent_run_id", llmcb_text(ev->run->parent_id));
    llmcbi_jsonl_int(k, "seq", (int64_t)ev->seq);
    llmcbi_jsonl_payload(k, ev);
    llmcbi_buf_text(&k->alloc, &k->line, "}\n");
    k->full =
        !k->line.failed && !llmcbi_write_all(k->fd, k->line.ptr, k->line.len);
    failed = k->line.failed || k->full;
    k->line.failed = false;
    pthread_mutex_unlock(&k->mutex);
    return failed ? LLMCB_EIO : 0;
}

LLMCBI_DEF llmcb_handler *llmcb_jsonl_handler(llmcb_loop *loop,
                                              const char *path, bool content)
{
    llmcbi_kit *k = path ? llmcbi_kit_new(loop, "jsonl") : NULL;
    llmcb_sync_table *t;

    if (!k) return NULL;
    k->content = content;
    k->fd = llmcbi_open_file(path, LLMCBI_APPEND);
    if (k->fd < 0) return llmcbi_kit_refused(k);
    t = &k->h.sync;
    llmcbi_kit_starts(t, llmcbi_jsonl_told);
    llmcbi_kit_finishes(t, llmcbi_jsonl_told);
    t->on_llm_new_token = t->on_text = t->on_retry = llmcbi_jsonl_told;
    t->on_agent_action = t->on_agent_finish = llmcbi_jsonl_told;
    t->on_custom_event = llmcbi_jsonl_told;
    return &k->h;
}
#endif

/* -- timing */

static int llmcbi_timing_told(llmcb_handler *h, const llmcb_event *ev)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    int64_t now = ((const llmcbi_run *)(const void *)ev->run)->loop->now;
    llmcbi_pace **at, *p;
    llmcb_timing *t;
    bool ok = true;

    pthread_mutex_lock(&k->mutex);
    for (at = &k->paces; *at && strcmp((*at)->id, ev->run->id) != 0;)
        at = &(*at)->next;
    p = *at;
    t = p ? &p->so_far : NULL;
    if (ev->kind == LLMCB_CHAT_MODEL_START) {
        p = (llmcbi_pace *)llmcbi_alloc(&k->alloc, sizeof *p);
        ok = p != NULL;
        if (p) {
            memcpy(p->id, ev->run->id, sizeof p->id);
            p->so_far.first_token_ms = -1;
            p->next = k->paces;
            k->paces = p;
        }
    } else if (p && ev->kind == LLMCB_LLM_NEW_TOKEN) {
        if (ev->token->text.len) {
            if (!t->tokens++) {
                t->first_token_ms = now - ev->run->started_ms;
                p->first = now;
            } else if (now - p->last > t->longest_gap_ms) {
                t->longest_gap_ms = now - p->last;
            }
            p->last = now;
        }
    } else if (p) {
        t->total_ms = ev->run->finished_ms - ev->run->started_ms;
        if (t->tokens > 1 && p->last > p->first)
            t->tokens_per_second =
                (double)(t->tokens - 1) * 1000 / (double)(p->last - p->first);
        t->runs = k->timing.runs + 1;
        k->timing = *t;
        *at = p->next;
        llmcbi_free(&k->alloc, p, sizeof *p);
    }
    pthread_mutex_unlock(&k->mutex);
    return ok ? 0 : LLMCB_ENOMEM;
}

LLMCBI_DEF llmcb_handler *llmcb_timing_handler(llmcb_loop *loop)
{
    llmcbi_kit *k = llmcbi_kit_new(loop, "timing");
    llmcb_sync_table *t;

    if (!k) return NULL;
    k->timing.first_token_ms = -1;
    k->h.flags = LLMCB_INLINE;
    t = &k->h.sync;
    t->on_chat_model_start = t->on_llm_new_token = llmcbi_timing_told;
    t->on_llm_end = t->on_llm_error = llmcbi_timing_told;
    return &k->h;
}

LLMCBI_DEF llmcb_timing llmcb_timing_of(llmcb_handler *h)
{
    llmcbi_kit *k = (llmcbi_kit *)(void *)h;
    llmcb_timing t;

    memset(&t, 0, sizeof t);
    if (!k) return t;
    pthread_mutex_lock(&k->mutex);
    t = k->timing;
    pthread_mutex_unlock(&k->mutex);
    return t;
}

#endif /* LLMCB_NO_KIT */

#ifdef __cplusplus
}
#endif
#endif /* LLMCB_IMPLEMENTATION */

/*
 * VERSION HISTORY
 *
 *   0.1.0  the first version
 *
 * LICENCE: this software is available under two licences; choose the one
 * that you prefer.
 *
 * ---------------------------------------------------------------------------
 * ALTERNATIVE A - MIT
 *
 * Copyright (c) 2026 the llmcb.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a
 * copy of this software and associated documentation files (the "Software"),
 * to deal in the Software without restriction, including without limitation
 * the rights to use, copy, modify, merge, publish, distribute, sublicense,
 * and/or sell copies of the Software, and to permit persons to whom the
 * Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in
 * all copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING
 * FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
 * DEALINGS IN THE SOFTWARE.
 *
 * ---------------------------------------------------------------------------
 * ALTERNATIVE B - Public Domain (www.unlicense.org)
 *
 * This is free and unencumbered software released into the public domain.
 *
 * Anyone is free to copy, modify, publish, use, compile, sell, or distribute
 * this software, either in source code form or as a compiled binary, for any
 * purpose, commercial or non-commercial, and by any means.
 *
 * In jurisdictions that recognize copyright laws, the author or authors of
 * this software dedicate any and all copyright interest in the software to
 * the public domain. We make this dedication for the benefit of the public at
 * large and to the detriment of our heirs and successors. We intend this
 * dedication to be an overt act of relinquishment in perpetuity of all
 * present and future rights to this software under copyright law.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
 * ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
 * CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
