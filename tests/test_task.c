/* Coroutines and operations: every await, every way to end one, and the
 * rules of step functions. All on the virtual clock; what waits for a
 * descriptor that nothing comes from holds that clock. */
#if !defined(TEST_LINKED) && !defined(LLMCB_NO_CURL)
#define LLMCB_NO_CURL
#endif
#include "impl.h"
#include "test.h"
#include <signal.h>
#include <sys/wait.h>

/* ---- helpers ------------------------------------------------------------ */

/* Counts, checks the sizes it is told, and makes one or all calls fail. */
typedef struct counter {
    pthread_mutex_t mutex;
    long live, made, fail_at;
    bool forever, failed, wrong_size;
} counter;

static void *counter_resize(void *user, void *ptr, size_t old, size_t size)
{
    counter *c = (counter *)user;
    enum { HEAD = 16 / sizeof(size_t) }; /* what is handed out is aligned */
    size_t *from = ptr ? (size_t *)ptr - HEAD : NULL, *to = NULL;

    pthread_mutex_lock(&c->mutex);
    if (from && from[0] != old) c->wrong_size = true;
    if (size) {
        long at = c->made++;
        bool fail = c->fail_at >= 0 &&
                    (c->forever ? at >= c->fail_at : at == c->fail_at);
        if (fail) c->failed = true;
        else to = (size_t *)malloc(size + HEAD * sizeof *to);
        if (!to) {
            pthread_mutex_unlock(&c->mutex);
            return NULL;
        }
        memset(to, 0xA5, size + HEAD * sizeof *to);
        to[0] = size;
        if (from) memcpy(to + HEAD, ptr, old < size ? old : size);
    }
    c->live += (to ? 1 : 0) - (from ? 1 : 0);
    pthread_mutex_unlock(&c->mutex);
    /* never in place, so that a stale pointer is found */
    free(from);
    return to ? to + HEAD : NULL;
}

static void counter_init(counter *c)
{
    memset(c, 0, sizeof *c);
    pthread_mutex_init(&c->mutex, NULL);
    c->fail_at = -1;
}

static llmcb_loop *loop_with(counter *c, bool virtual_clock, unsigned workers)
{
    llmcb_loop_desc desc;

    memset(&desc, 0, sizeof desc);
    if (c) {
        desc.allocator.resize = counter_resize;
        desc.allocator.user = c;
    }
    desc.virtual_clock = virtual_clock;
    desc.workers = workers;
    return llmcb_loop_new(&desc);
}

static llmcb_loop *virtual_loop(void)
{
    return loop_with(NULL, true, 2);
}

/* A number that threads wait for. */
typedef struct gate {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    int value;
} gate;

#define GATE_INIT { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 }

static void gate_set(gate *g, int value)
{
    pthread_mutex_lock(&g->mutex);
    g->value = value;
    pthread_cond_broadcast(&g->cond);
    pthread_mutex_unlock(&g->mutex);
}

static void gate_add(gate *g)
{
    pthread_mutex_lock(&g->mutex);
    g->value++;
    pthread_cond_broadcast(&g->cond);
    pthread_mutex_unlock(&g->mutex);
}

static int gate_get(gate *g)
{
    int value;

    pthread_mutex_lock(&g->mutex);
    value = g->value;
    pthread_mutex_unlock(&g->mutex);
    return value;
}

static void gate_wait(gate *g, int least)
{
    pthread_mutex_lock(&g->mutex);
    while (g->value < least) pthread_cond_wait(&g->cond, &g->mutex);
    pthread_mutex_unlock(&g->mutex);
}

/* An operation that ends after ms with a code; ms < 0: when fd is ready. */
typedef struct part {
    int64_t ms;
    llmcb_code code;
    int fd;
    llmcb_code result; /* of its own await */
    int ended;
} part;

static llmcb_step part_step(llmcb_task *t)
{
    part *p = (part *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, p->ms < 0 ? llmcb_await_fd(t, p->fd, LLMCB_READ,
                                              LLMCB_FOREVER)
                             : llmcb_sleep(t, p->ms));
    p->result = t->result;
    p->ended++;
    return p->code;
    LLMCB_END(t);
}

static void part_set(part *p, int64_t ms, llmcb_code code)
{
    memset(p, 0, sizeof *p);
    p->ms = ms;
    p->code = code;
    p->fd = -1;
    p->result = (llmcb_code)1;
}

/* A step function that hands on to a function of the test. */
typedef struct once {
    llmcb_step (*arm)(llmcb_task *t, void *arg);
    void *arg;
    llmcb_code result;
    size_t index;
    int64_t when; /* -1: not yet */
} once;

static llmcb_step once_step(llmcb_task *t)
{
    once *o = (once *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, o->arm(t, o->arg));
    o->result = t->result;
    o->index = t->index;
    o->when = llmcb_loop_now(llmcb_task_loop(t));
    LLMCB_END(t);
}

static llmcb_op *once_start(llmcb_loop *loop, once *o,
                            llmcb_step (*arm)(llmcb_task *, void *),
                            void *arg)
{
    o->arm = arm;
    o->arg = arg;
    o->result = (llmcb_code)1;
    o->index = 77;
    o->when = -1;
    return llmcb_task_start(loop, once_step, 0, o);
}

/* The result of one await that ends by itself. */
static llmcb_code once_run(llmcb_loop *loop,
                           llmcb_step (*arm)(llmcb_task *, void *), void *arg)
{
    once o;
    llmcb_op *op = once_start(loop, &o, arm, arg);
    llmcb_code code = llmcb_op_wait(op);

    llmcb_op_free(op);
    return code == LLMCB_OK ? o.result : code;
}

static void turns(llmcb_loop *loop, int n)
{
    while (n--) llmcb_loop_run_once(loop, 0);
}

static int gated_job(void *arg)
{
    gate_wait((gate *)arg, 1);
    return LLMCB_EIO;
}

/* A recorded stream whose chunks come `delay` after each other. */
#define CHUNK(text)                                                      \
    "data: {\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,"      \
    "\"delta\":{\"content\":\"" text "\"},\"finish_reason\":null}]}\n\n"

#define LAST                                                            \
    "data: {\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,"      \
    "\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"

static llmcb_chat *stream_chat(llmcb_loop *loop, int64_t delay)
{
    static const char *const parts[] = {
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
        CHUNK("one"), CHUNK("two"), CHUNK("three"), LAST
    };
    char bytes[2048] = "";
    llmcb_segment segments[5];
    llmcb_recording recording;
    llmcb_replay_desc replay;
    llmcb_chat_desc desc;
    size_t i;

    memset(&recording, 0, sizeof recording);
    memset(&replay, 0, sizeof replay);
    memset(&desc, 0, sizeof desc);
    for (i = 0; i < 5; i++) {
        segments[i].offset = strlen(bytes);
        segments[i].delay_ms = i ? delay : 0;
        strcat(bytes, parts[i]);
    }
    recording.bytes = bytes;
    recording.len = strlen(bytes);
    recording.segments = segments;
    recording.n_segments = 5;
    recording.end = LLMCB_REPLAY_CLOSE;
    replay.recordings = &recording;
    replay.n_recordings = 1;
    desc.base_url = "http://127.0.0.1:1/v1";
    desc.api_key = "";
    desc.max_retries = -1;
    desc.first_byte_ms = desc.idle_ms = LLMCB_FOREVER;
    desc.transport = llmcb_replay_new(loop, &replay);
    return llmcb_chat_new(loop, &desc);
}

static llmcb_op *stream_start(llmcb_chat *chat)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = "hello";
    return llmcb_chat_stream(chat, &m, 1, NULL);
}

/* ---- cancel, at every await and in every way ---------------------------- */

enum { AT_SLEEP, AT_FD, AT_OP, AT_ALL, AT_ANY, AT_BLOCKING, AT_CHUNK, AT_N };
enum {
    BY_LOOP,    /* between turns */
    BY_POST,    /* inside a callback */
    BY_TWO,     /* twice before it is told */
    BY_THREAD,
    BY_SIGNAL,
    BY_FREE,    /* llmcb_op_free */
    BY_AGAIN,   /* once more while it cleans up */
    BY_EARLY,   /* before its first step */
    BY_LOOP_FREE,
    BY_N
};
static const char *const at_names[] = { "sleep", "fd",       "op",   "all",
                                        "any",   "blocking", "chunk" };
static const char *const by_names[] = { "loop",  "post",  "two",
                                        "thread", "signal", "free",
                                        "again", "early", "loop_free" };

typedef struct probe {
    int at;
    int fds[2];
    llmcb_op *others[2], *stream;
    gate *g;
    llmcb_code codes[4];
    int n;
    llmcb_op *op;
} probe;

static llmcb_step probe_arm(llmcb_task *t, probe *p)
{
    switch (p->at) {
    case AT_SLEEP: return llmcb_sleep(t, 1000000);
    case AT_FD: return llmcb_await_fd(t, p->fds[0], LLMCB_READ, 1000000);
    case AT_OP: return llmcb_await(t, p->others[0]);
    case AT_ALL: return llmcb_await_all(t, p->others, 2, 1000000);
    case AT_ANY: return llmcb_await_any(t, p->others, 2, LLMCB_FOREVER);
    case AT_BLOCKING: return llmcb_await_blocking(t, gated_job, p->g);
    case AT_CHUNK: return llmcb_await_chunk(t, p->stream);
    default: return llmcb_await(t, NULL); /* has ended already */
    }
}

static llmcb_step probe_step(llmcb_task *t)
{
    probe *p = (probe *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, probe_arm(t, p));
    p->codes[p->n++] = t->result;
    LLMCB_AWAIT(t, llmcb_sleep(t, 0));
    p->codes[p->n++] = t->result;
    LLMCB_AWAIT(t, llmcb_sleep(t, 0));
    p->codes[p->n++] = t->result;
    return LLMCB_EPROTO;
    LLMCB_END(t);
}

static void cancel_post(void *arg)
{
    llmcb_op_cancel((llmcb_op *)arg);
}

static void *cancel_thread(void *arg)
{
    llmcb_op_cancel((llmcb_op *)arg);
    return NULL;
}

static llmcb_op *volatile signal_op;

static void on_signal(int number)
{
    (void)number;
    llmcb_op_cancel(signal_op);
}

static void probe_cancel(llmcb_loop *loop, probe *p, int by)
{
    pthread_t thread;

    switch (by) {
    case BY_TWO: llmcb_op_cancel(p->op); break;
    case BY_POST: llmcb_loop_post(loop, cancel_post, p->op); return;
    case BY_THREAD:
        REQUIRE(!pthread_create(&thread, NULL, cancel_thread, p->op));
        while (!llmcb_op_done(p->op))
            llmcb_loop_run_once(loop, LLMCB_FOREVER);
        pthread_join(thread, NULL);
        return;
    case BY_SIGNAL:
        signal_op = p->op;
        raise(SIGUSR1);
        return;
    case BY_FREE:
        llmcb_op_free(p->op);
        p->op = NULL;
        return;
    case BY_AGAIN:
        llmcb_op_cancel(p->op);
        turns(loop, 1);
        CHECK_INT(p->n, 1);
        break;
    default: break;
    }
    llmcb_op_cancel(p->op);
}

static void cancel_at(int at, int by)
{
    counter c;
    llmcb_loop *loop;
    gate g = GATE_INIT;
    part holds, others[2];
    llmcb_op *hold;
    llmcb_chat *chat = NULL;
    int fds[2], i;
    probe p;

    counter_init(&c);
    memset(&p, 0, sizeof p);
    loop = loop_with(&c, true, 2);
    REQUIRE(pipe(fds) == 0 && pipe(p.fds) == 0);
    part_set(&holds, -1, LLMCB_OK);
    holds.fd = fds[0];
    hold = llmcb_task_start(loop, part_step, 0, &holds);
    for (i = 0; i < 2; i++) {
        part_set(&others[i], 5000000, LLMCB_OK);
        p.others[i] = llmcb_task_start(loop, part_step, 0, &others[i]);
    }
    p.at = at;
    p.g = &g;
    if (at == AT_CHUNK) {
        chat = stream_chat(loop, 3000000);
        p.stream = stream_start(chat);
        turns(loop, 5);
    }
    p.op = llmcb_task_start(loop, probe_step, 0, &p);
    if (by != BY_EARLY) turns(loop, 2);
    CHECK_INT(p.n, 0);
    llmcb_chat_free(chat);
    if (by == BY_LOOP_FREE) {
        gate_set(&g, 1);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        for (i = 0; i < 3; i++) CHECK_INT(p.codes[i], LLMCB_ECANCELLED);
    } else {
        probe_cancel(loop, &p, by);
        turns(loop, 5);
        CHECK_INT(p.codes[0], LLMCB_ECANCELLED);
        CHECK_INT(p.codes[1], by == BY_AGAIN ? LLMCB_ECANCELLED : LLMCB_OK);
        CHECK_INT(p.codes[2], LLMCB_OK);
        if (p.op) {
            CHECK_INT(llmcb_op_code(p.op), LLMCB_EPROTO);
            llmcb_op_cancel(p.op); /* too late: nothing happens */
            turns(loop, 2);
            CHECK_INT(llmcb_op_code(p.op), LLMCB_EPROTO);
        }
        /* what it waited for is untouched */
        for (i = 0; i < 2; i++) CHECK(!llmcb_op_done(p.others[i]));
        if (p.stream) CHECK(!llmcb_op_done(p.stream));
        gate_set(&g, 1);
        llmcb_op_free(p.op);
        llmcb_op_free(p.others[0]);
        llmcb_op_free(p.others[1]);
        llmcb_op_free(p.stream);
        llmcb_op_free(hold);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
    CHECK_INT(p.n, 3);
    CHECK_INT(c.live, 0);
    CHECK(!c.wrong_size);
    for (i = 0; i < 2; i++) {
        close(fds[i]);
        close(p.fds[i]);
    }
}

TEST(cancel_at_every_await_in_every_way)
{
    struct sigaction act, before;
    int at, by;

    memset(&act, 0, sizeof act);
    act.sa_handler = on_signal;
    REQUIRE(sigaction(SIGUSR1, &act, &before) == 0);
    for (at = 0; at < AT_N; at++)
        for (by = 0; by < BY_N; by++) {
            int already = test_failures_here;
            cancel_at(at, by);
            if (test_failures_here != already)
                printf("  ... at %s, by %s\n", at_names[at], by_names[by]);
        }
    sigaction(SIGUSR1, &before, NULL);
}

static llmcb_step never_awaits(llmcb_task *t)
{
    ++*(int *)t->self;
    return LLMCB_EPROTO;
}

/* A cancel is told at an await; a coroutine without one runs to its end. */
TEST(cancel_before_the_first_step_of_one_that_never_awaits)
{
    llmcb_loop *loop = virtual_loop();
    int steps = 0;
    llmcb_op *op = llmcb_task_start(loop, never_awaits, 0, &steps);

    llmcb_op_cancel(op);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EPROTO);
    CHECK_INT(steps, 1);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

static llmcb_step awaits_any(llmcb_task *t)
{
    llmcb_op *ops[2] = { (llmcb_op *)t->self, (llmcb_op *)t->self };

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_any(t, ops, 2, LLMCB_FOREVER));
    return t->result == LLMCB_ECANCELLED && t->index == 2 ? LLMCB_DONE
                                                          : LLMCB_EPROTO;
    LLMCB_END(t);
}

static llmcb_step sleeps_a_day(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 86400000));
    LLMCB_END(t);
}

/* None of them has ended, whether the cancel came before the await or in it. */
TEST(await_any_that_is_cancelled_names_none)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_op *other = llmcb_task_start(loop, sleeps_a_day, 0, NULL);
    int turns;

    for (turns = 0; turns < 2; turns++) {
        llmcb_op *op = llmcb_task_start(loop, awaits_any, 0, other);
        if (turns) llmcb_loop_run_once(loop, 0);
        llmcb_op_cancel(op);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
    }
    llmcb_op_free(other);
    llmcb_loop_free(loop);
}

static llmcb_step has_no_frame(llmcb_task *t)
{
    *(bool *)t->self = t->frame == NULL;
    return LLMCB_DONE;
}

/* A frame that was forgotten is NULL, and no memory of somebody else. */
TEST(no_frame_is_null)
{
    llmcb_loop *loop = virtual_loop();
    bool none = false;
    llmcb_op *op = llmcb_task_start(loop, has_no_frame, 0, &none);

    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK(none);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* ---- await_fd ----------------------------------------------------------- */

typedef struct fd_row {
    int fd, events;
    int64_t ms;
} fd_row;

static llmcb_step arm_fd(llmcb_task *t, void *arg)
{
    const fd_row *r = (const fd_row *)arg;

    return llmcb_await_fd(t, r->fd, r->events, r->ms);
}

TEST(await_fd_arguments)
{
    static const struct {
        int which, events;
        int64_t ms;
        llmcb_code code;
    } rows[] = {
        /* which: 0 readable, 1 writable, 2 never readable, -1 none */
        { 0, LLMCB_READ, LLMCB_FOREVER, LLMCB_OK },
        { 0, LLMCB_READ, 0, LLMCB_OK },
        { 0, LLMCB_READ | LLMCB_WRITE, LLMCB_FOREVER, LLMCB_OK },
        { 1, LLMCB_WRITE, LLMCB_FOREVER, LLMCB_OK },
        { 2, LLMCB_READ, 0, LLMCB_ETIMEDOUT },
        { 0, 0, LLMCB_FOREVER, LLMCB_EINVAL },
        { 0, 4, LLMCB_FOREVER, LLMCB_EINVAL },
        { 0, LLMCB_READ | 8, LLMCB_FOREVER, LLMCB_EINVAL },
        { 0, -1, LLMCB_FOREVER, LLMCB_EINVAL },
        { -1, LLMCB_READ, LLMCB_FOREVER, LLMCB_EINVAL },
    };
    llmcb_loop *loop = llmcb_loop_new(NULL);
    int full[2], empty[2];
    size_t i;

    REQUIRE(pipe(full) == 0 && pipe(empty) == 0);
    REQUIRE(write(full[1], "x", 1) == 1);
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fd_row r;
        llmcb_code code;
        r.fd = rows[i].which < 0    ? -1
               : rows[i].which == 0 ? full[0]
               : rows[i].which == 1 ? full[1]
                                    : empty[0];
        r.events = rows[i].events;
        r.ms = rows[i].ms;
        code = once_run(loop, arm_fd, &r);
        /* with a limit of 0 either may win */
        if (i == 1 && code == LLMCB_ETIMEDOUT) code = LLMCB_OK;
        if (code != rows[i].code)
            TEST_FAIL("row %d: %d", (int)i, (int)code);
    }
    llmcb_loop_free(loop);
    close(full[0]);
    close(full[1]);
    close(empty[0]);
    close(empty[1]);
}

TEST(await_fd_times_out_on_the_loops_clock)
{
    llmcb_loop *loop = virtual_loop();
    int fds[2];
    fd_row r = { -1, LLMCB_READ, 50 };
    once o;
    llmcb_op *op;

    REQUIRE(pipe(fds) == 0);
    r.fd = fds[0];
    op = once_start(loop, &o, arm_fd, &r);
    turns(loop, 2);
    llmcb_clock_advance(loop, 49);
    turns(loop, 1);
    CHECK_INT(o.when, -1);
    llmcb_clock_advance(loop, 1);
    turns(loop, 1);
    CHECK_INT(o.result, LLMCB_ETIMEDOUT);
    llmcb_op_free(op);
    /* it is watched no more: the clock jumps again, and it can be awaited */
    op = once_start(loop, &o, arm_fd, &r);
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(o.result, LLMCB_OK);
    CHECK_INT(o.when, 50);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
    close(fds[0]);
    close(fds[1]);
}

typedef struct hasty {
    int fd, steps;
} hasty;

static llmcb_step arms_and_ends(llmcb_task *t)
{
    hasty *h = (hasty *)t->self;

    h->steps++;
    llmcb_await_fd(t, h->fd, LLMCB_READ, LLMCB_FOREVER);
    return LLMCB_DONE;
}

/* A coroutine that ends all the same has not left its descriptor behind. */
TEST(await_fd_that_is_not_waited_for)
{
    llmcb_loop *loop = virtual_loop();
    int fds[2];
    fd_row r = { -1, LLMCB_READ, LLMCB_FOREVER };
    hasty h = { -1, 0 };
    once o;
    llmcb_op *op, *next;

    REQUIRE(pipe(fds) == 0);
    r.fd = h.fd = fds[0];
    op = llmcb_task_start(loop, arms_and_ends, 0, &h);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    next = once_start(loop, &o, arm_fd, &r);
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK_INT(llmcb_op_wait(next), LLMCB_OK);
    CHECK_INT(o.result, LLMCB_OK);
    CHECK_INT(h.steps, 1);
    llmcb_op_free(next);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
    close(fds[0]);
    close(fds[1]);
}

TEST(await_fd_one_at_a_time)
{
    llmcb_loop *loop = virtual_loop();
    int fds[2];
    fd_row r = { -1, LLMCB_READ, LLMCB_FOREVER };
    once first, second;
    llmcb_op *a, *b;

    REQUIRE(pipe(fds) == 0);
    r.fd = fds[0];
    a = once_start(loop, &first, arm_fd, &r);
    b = once_start(loop, &second, arm_fd, &r);
    turns(loop, 2);
    CHECK_INT(second.result, LLMCB_EBUSY);
    CHECK_INT(first.when, -1);
    llmcb_op_free(b);
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK_INT(llmcb_op_wait(a), LLMCB_OK);
    CHECK_INT(first.result, LLMCB_OK);
    llmcb_op_free(a);
    b = once_start(loop, &second, arm_fd, &r);
    CHECK_INT(llmcb_op_wait(b), LLMCB_OK);
    CHECK_INT(second.result, LLMCB_OK);
    llmcb_op_free(b);
    llmcb_loop_free(loop);
    close(fds[0]);
    close(fds[1]);
}

/* The far end is closed: whoever waits must look for himself. */
TEST(await_fd_hang_up_and_reuse)
{
    static const char filler[4096] = "";
    llmcb_loop *loop = virtual_loop();
    int i;

    for (i = 0; i < 6; i++) { /* the same numbers again and again */
        int fds[2];
        fd_row r = { -1, 0, LLMCB_FOREVER };
        once o;
        llmcb_op *op;

        REQUIRE(pipe(fds) == 0);
        r.fd = fds[i % 2];
        r.events = i % 2 ? LLMCB_WRITE : LLMCB_READ;
        if (i % 2) { /* full, so that only the hang-up can end it */
            CHECK(fcntl(fds[1], F_SETFL, O_NONBLOCK) == 0);
            while (write(fds[1], filler, sizeof filler) > 0) continue;
        }
        op = once_start(loop, &o, arm_fd, &r);
        turns(loop, 2);
        CHECK_INT(o.when, -1);
        close(fds[1 - i % 2]);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(o.result, LLMCB_OK);
        llmcb_op_free(op);
        close(fds[i % 2]);
    }
    llmcb_loop_free(loop);
}

/* poll(2) says that a file is always ready; epoll refuses it. The loop says
 * the same whichever is behind it. */
TEST(await_fd_of_a_file)
{
    llmcb_loop *loop = virtual_loop();
    fd_row r = { -1, LLMCB_READ, LLMCB_FOREVER };

    r.fd = open("/dev/null", O_RDONLY);
    if (r.fd >= 0) CHECK_INT(once_run(loop, arm_fd, &r), LLMCB_OK);
    close(r.fd);
    r.fd = open("/etc/passwd", O_RDONLY);
    if (r.fd >= 0) CHECK_INT(once_run(loop, arm_fd, &r), LLMCB_OK);
    close(r.fd);
    llmcb_loop_free(loop);
}

/* ---- await one operation ------------------------------------------------ */

static llmcb_step arm_op(llmcb_task *t, void *arg)
{
    return llmcb_await(t, (llmcb_op *)arg);
}

TEST(await_an_operation)
{
    static const struct {
        int64_t ms;     /* -1: it is done already */
        llmcb_code code;
    } rows[] = { { -1, LLMCB_OK },  { -1, LLMCB_EIO }, { 0, LLMCB_OK },
                 { 20, LLMCB_OK },  { 20, LLMCB_EIO },
                 { 20, LLMCB_ECANCELLED } };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmcb_loop *loop = virtual_loop();
        part p;
        once o;
        llmcb_op *op, *by;

        part_set(&p, rows[i].ms < 0 ? 0 : rows[i].ms, rows[i].code);
        op = llmcb_task_start(loop, part_step, 0, &p);
        if (rows[i].ms < 0) CHECK_INT(llmcb_op_wait(op), rows[i].code);
        by = once_start(loop, &o, arm_op, op);
        CHECK_INT(o.when, -1); /* never before it returns */
        CHECK_INT(llmcb_op_wait(by), LLMCB_OK);
        CHECK_INT(o.result, rows[i].code);
        CHECK_INT(o.when, rows[i].ms < 0 ? 0 : rows[i].ms);
        llmcb_op_free(by);
        llmcb_op_free(op);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
}

TEST(await_what_cannot_be_awaited)
{
    llmcb_loop *loop = virtual_loop(), *other = virtual_loop();
    part p;
    llmcb_op *op;

    part_set(&p, 10, LLMCB_OK);
    op = llmcb_task_start(other, part_step, 0, &p);
    CHECK_INT(once_run(loop, arm_op, NULL), LLMCB_ENOMEM);
    CHECK_INT(once_run(loop, arm_op, op), LLMCB_EINVAL);
    CHECK_INT(llmcb_loop_run_until(loop, op), LLMCB_EINVAL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(once_run(loop, arm_op, op), LLMCB_EINVAL);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
    llmcb_loop_free(other);
}

/* Freed while several wait for it: all are told, and it is cancelled. */
TEST(await_an_operation_that_is_freed)
{
    counter c;
    llmcb_loop *loop;
    int fds[2], i;
    part p;
    once o[5];
    llmcb_op *op, *by[5];

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    REQUIRE(pipe(fds) == 0);
    part_set(&p, -1, LLMCB_OK);
    p.fd = fds[0];
    op = llmcb_task_start(loop, part_step, 0, &p);
    for (i = 0; i < 5; i++) by[i] = once_start(loop, &o[i], arm_op, op);
    turns(loop, 2);
    llmcb_op_free(by[2]); /* one that waits goes first */
    turns(loop, 1);
    CHECK_INT(o[2].result, LLMCB_ECANCELLED);
    llmcb_op_free(op);
    turns(loop, 3);
    CHECK_INT(p.result, LLMCB_ECANCELLED);
    for (i = 0; i < 5; i++) {
        CHECK_INT(o[i].result, LLMCB_ECANCELLED);
        if (i != 2) llmcb_op_free(by[i]);
    }
    CHECK(!llmcb_loop_alive(loop));
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
    close(fds[0]);
    close(fds[1]);
}

/* All that wait for one operation go on in its turn. */
TEST(await_one_operation_from_many)
{
    enum { N = 100 };
    static once o[N];
    llmcb_op *by[N], *op;
    llmcb_loop *loop = virtual_loop();
    part p;
    int i;

    part_set(&p, 7, LLMCB_EIO);
    op = llmcb_task_start(loop, part_step, 0, &p);
    for (i = 0; i < N; i++) by[i] = once_start(loop, &o[i], arm_op, op);
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    for (i = 0; i < N; i++) {
        CHECK_INT(o[i].result, LLMCB_EIO);
        CHECK_INT(o[i].when, 7);
        llmcb_op_free(by[i]);
    }
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* ---- await several ------------------------------------------------------ */

typedef struct many {
    bool any;
    llmcb_op *ops[4];
    size_t n;
    int64_t timeout;
    bool no_array;
} many;

static llmcb_step arm_many(llmcb_task *t, void *arg)
{
    const many *m = (const many *)arg;
    llmcb_op *copy[4];
    llmcb_step step;

    memcpy(copy, m->ops, sizeof copy);
    step = (m->any ? llmcb_await_any : llmcb_await_all)(
        t, m->no_array ? NULL : copy, m->n, m->timeout);
    memset(copy, 0xA5, sizeof copy); /* it must have its own */
    return step;
}

TEST(await_all_and_any)
{
    enum { ALL, ANY };
    /* ms of each operation: DONE: it is done; NOP: NULL; else when it ends.
     * SAME: the first one once more. */
    enum { DONE = -1, NOP = -2, SAME = -3 };
    static const struct {
        int any;
        int n;
        int ms[4];
        llmcb_code code[4];
        int64_t timeout;
        llmcb_code want;
        int index; /* of any */
        int64_t when;
    } rows[] = {
        { ALL, 0, { 0 }, { LLMCB_OK }, -1, LLMCB_OK, 0, 0 },
        { ANY, 0, { 0 }, { LLMCB_OK }, -1, LLMCB_OK, 0, 0 },
        { ALL, 3, { 30, 10, 20 }, { LLMCB_OK }, -1, LLMCB_OK, 0, 30 },
        { ALL, 3, { DONE, 10, DONE }, { LLMCB_OK }, -1, LLMCB_OK, 0, 10 },
        { ALL, 2, { DONE, DONE }, { LLMCB_OK }, -1, LLMCB_OK, 0, 0 },
        /* the first error in the array, not the first in time */
        { ALL, 3, { 30, 10, 20 }, { LLMCB_EIO, LLMCB_EDNS, LLMCB_ETLS }, -1,
          LLMCB_EIO, 0, 30 },
        { ALL, 3, { 10, 30, 20 }, { LLMCB_OK, LLMCB_EDNS, LLMCB_ETLS }, -1,
          LLMCB_EDNS, 0, 30 },
        { ALL, 3, { 10, DONE, 5 }, { LLMCB_EIO, LLMCB_EDNS, LLMCB_ETLS }, -1,
          LLMCB_EIO, 0, 10 },
        { ALL, 3, { 10, DONE, DONE }, { LLMCB_OK, LLMCB_EDNS, LLMCB_ETLS },
          -1, LLMCB_EDNS, 0, 10 },
        { ALL, 2, { DONE, DONE }, { LLMCB_EIO, LLMCB_EDNS }, -1, LLMCB_EIO,
          0, 0 },
        { ALL, 2, { DONE, DONE }, { LLMCB_OK, LLMCB_EDNS }, -1, LLMCB_EDNS,
          0, 0 },
        /* errors do not end it early */
        { ALL, 2, { 5, 90 }, { LLMCB_EIO, LLMCB_OK }, -1, LLMCB_EIO, 0, 90 },
        { ANY, 3, { 30, 10, 20 }, { LLMCB_OK }, -1, LLMCB_OK, 1, 10 },
        { ANY, 3, { 30, 10, 20 }, { LLMCB_OK, LLMCB_EIO, LLMCB_OK }, -1,
          LLMCB_EIO, 1, 10 },
        { ANY, 3, { 30, 20, DONE }, { LLMCB_OK, LLMCB_OK, LLMCB_EIO }, -1,
          LLMCB_EIO, 2, 0 },
        { ANY, 3, { 30, DONE, DONE }, { LLMCB_OK, LLMCB_OK, LLMCB_EIO }, -1,
          LLMCB_OK, 1, 0 },
        { ANY, 3, { DONE, 5, DONE }, { LLMCB_EIO }, -1, LLMCB_EIO, 0, 0 },
        /* limits */
        { ALL, 2, { 10, 50 }, { LLMCB_EIO, LLMCB_OK }, 20, LLMCB_ETIMEDOUT,
          0, 20 },
        { ALL, 2, { 10, 19 }, { LLMCB_OK }, 20, LLMCB_OK, 0, 19 },
        { ANY, 2, { 40, 50 }, { LLMCB_OK }, 20, LLMCB_ETIMEDOUT, 2, 20 },
        { ANY, 2, { 40, 19 }, { LLMCB_OK }, 20, LLMCB_OK, 1, 19 },
        { ALL, 2, { 40, 50 }, { LLMCB_OK }, 0, LLMCB_ETIMEDOUT, 0, 0 },
        { ALL, 2, { DONE, DONE }, { LLMCB_OK }, 0, LLMCB_OK, 0, 0 },
        { ANY, 2, { 40, DONE }, { LLMCB_OK }, 0, LLMCB_OK, 1, 0 },
        /* arguments */
        { ALL, 2, { 10, NOP }, { LLMCB_OK }, -1, LLMCB_ENOMEM, 0, 0 },
        { ANY, 2, { NOP, DONE }, { LLMCB_OK }, -1, LLMCB_ENOMEM, 0, 0 },
        { ANY, 3, { 10, DONE, NOP }, { LLMCB_OK }, -1, LLMCB_ENOMEM, 2, 0 },
        { ALL, 3, { 10, SAME, SAME }, { LLMCB_EIO }, -1, LLMCB_EIO, 0, 10 },
        { ANY, 3, { 10, SAME, SAME }, { LLMCB_EIO }, -1, LLMCB_EIO, -1, 10 },
    };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        counter c;
        llmcb_loop *loop;
        part p[4];
        many m;
        once o;
        llmcb_op *op, *mine[4] = { NULL, NULL, NULL, NULL };
        int k, already = test_failures_here;

        counter_init(&c);
        loop = loop_with(&c, true, 2);
        memset(&m, 0, sizeof m);
        m.any = rows[i].any == ANY;
        m.n = (size_t)rows[i].n;
        m.timeout = rows[i].timeout;
        for (k = 0; k < rows[i].n; k++) {
            int ms = rows[i].ms[k];
            if (ms == SAME) m.ops[k] = mine[0];
            if (ms == SAME || ms == NOP) continue;
            part_set(&p[k], ms == DONE ? 0 : ms, rows[i].code[k]);
            m.ops[k] = mine[k] = llmcb_task_start(loop, part_step, 0, &p[k]);
            if (ms == DONE) llmcb_op_wait(mine[k]);
        }
        op = once_start(loop, &o, arm_many, &m);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(o.result, rows[i].want);
        CHECK_INT(o.when, rows[i].when);
        if (m.any && rows[i].index >= 0) CHECK_INT(o.index, rows[i].index);
        /* the operations go on, each to its end */
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        for (k = 0; k < rows[i].n; k++) {
            if (!mine[k]) continue;
            CHECK_INT(p[k].result, LLMCB_OK);
            CHECK_INT(llmcb_op_code(mine[k]), rows[i].code[k]);
            llmcb_op_free(mine[k]);
        }
        llmcb_op_free(op);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
        if (test_failures_here != already)
            printf("  ... in row %d\n", (int)i);
    }
}

TEST(await_several_that_cannot_be_awaited)
{
    llmcb_loop *loop = virtual_loop(), *other = virtual_loop();
    part p;
    many m;
    int any;

    part_set(&p, 10, LLMCB_OK);
    memset(&m, 0, sizeof m);
    m.ops[0] = llmcb_task_start(other, part_step, 0, &p);
    m.timeout = LLMCB_FOREVER;
    for (any = 0; any < 2; any++) {
        m.any = any == 1;
        m.n = 1;
        m.no_array = false;
        CHECK_INT(once_run(loop, arm_many, &m), LLMCB_EINVAL);
        m.no_array = true;
        CHECK_INT(once_run(loop, arm_many, &m), LLMCB_EINVAL);
        m.n = 0;
        CHECK_INT(once_run(loop, arm_many, &m), LLMCB_OK);
    }
    llmcb_op_free(m.ops[0]);
    llmcb_loop_free(loop);
    llmcb_loop_free(other);
}

/* Operations of the array are freed while it waits. */
TEST(await_several_that_are_freed)
{
    int any;

    for (any = 0; any < 2; any++) {
        counter c;
        llmcb_loop *loop;
        part p[3];
        many m;
        once o;
        llmcb_op *op;
        int i;

        counter_init(&c);
        loop = loop_with(&c, true, 2);
        memset(&m, 0, sizeof m);
        m.any = any == 1;
        m.n = 3;
        m.timeout = LLMCB_FOREVER;
        for (i = 0; i < 3; i++) {
            part_set(&p[i], 10 + i, i == 2 ? LLMCB_EIO : LLMCB_OK);
            m.ops[i] = llmcb_task_start(loop, part_step, 0, &p[i]);
        }
        op = once_start(loop, &o, arm_many, &m);
        llmcb_loop_run_once(loop, 0);
        llmcb_op_free(m.ops[1]);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(o.result, LLMCB_ECANCELLED);
        CHECK_INT(o.when, any ? 0 : 12);
        if (any) CHECK_INT(o.index, 1);
        llmcb_op_free(op);
        llmcb_op_free(m.ops[0]);
        llmcb_op_free(m.ops[2]);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
    }
}

/* ---- await a blocking function ------------------------------------------ */

typedef struct job {
    gate *begun, *go, *ended;
    int returns;
} job;

static int job_run(void *arg)
{
    job *j = (job *)arg;

    if (j->begun) gate_add(j->begun);
    if (j->go) gate_wait(j->go, 1);
    if (j->ended) gate_add(j->ended);
    return j->returns;
}

static llmcb_step arm_job(llmcb_task *t, void *arg)
{
    return llmcb_await_blocking(t, arg ? job_run : NULL, arg);
}

TEST(await_blocking_results)
{
    static const struct {
        int returns;
        llmcb_code want;
    } rows[] = { { 0, LLMCB_OK },
                 { LLMCB_EIO, LLMCB_EIO },
                 { LLMCB_EFORK, LLMCB_EFORK },
                 { LLMCB_ECANCELLED, LLMCB_ECANCELLED } };
    llmcb_loop *loop = virtual_loop();
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        job j = { NULL, NULL, NULL, 0 };
        j.returns = rows[i].returns;
        CHECK_INT(once_run(loop, arm_job, &j), rows[i].want);
    }
    CHECK_INT(once_run(loop, arm_job, NULL), LLMCB_EINVAL);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* One job runs and one stands behind it (of two threads jobs get one). */
TEST(await_blocking_cancelled_while_running_and_while_queued)
{
    counter c;
    gate begun = GATE_INIT, go = GATE_INIT, ended = GATE_INIT;
    job running = { NULL, NULL, NULL, LLMCB_EIO }, queued = running,
        third = running;
    llmcb_loop *loop;
    once a, b;
    llmcb_op *first, *second;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    running.begun = &begun;
    running.go = &go;
    running.ended = &ended;
    queued.ended = &ended;
    first = once_start(loop, &a, arm_job, &running);
    turns(loop, 1);
    gate_wait(&begun, 1);
    second = once_start(loop, &b, arm_job, &queued);
    turns(loop, 1);
    llmcb_op_cancel(first);
    llmcb_op_cancel(second);
    turns(loop, 2);
    /* both have gone on, though the first function is still at work */
    CHECK_INT(a.result, LLMCB_ECANCELLED);
    CHECK_INT(b.result, LLMCB_ECANCELLED);
    CHECK(llmcb_op_done(first) && llmcb_op_done(second));
    CHECK(!llmcb_loop_alive(loop));
    CHECK_INT(gate_get(&ended), 0);
    gate_set(&go, 1);
    gate_wait(&ended, 1);
    /* one that comes behind the second finds it gone */
    CHECK_INT(once_run(loop, arm_job, &third), LLMCB_EIO);
    CHECK_INT(gate_get(&ended), 1);
    llmcb_op_free(first);
    llmcb_op_free(second);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

/* ---- await a chunk ------------------------------------------------------ */

typedef struct chunk_reader {
    llmcb_op *stream;
    char text[64];
    llmcb_code code;
    int64_t times[8];
    int n;
} chunk_reader;

static llmcb_step chunk_step(llmcb_task *t)
{
    chunk_reader *r = (chunk_reader *)t->self;
    const llmcb_chunk *chunk;

    LLMCB_BEGIN(t);
    for (;;) {
        LLMCB_AWAIT(t, llmcb_await_chunk(t, r->stream));
        r->code = t->result;
        if (t->result != LLMCB_OK) return LLMCB_OK;
        if (!llmcb_op_next(r->stream, &chunk)) {
            if (llmcb_op_done(r->stream)) return LLMCB_OK;
            return LLMCB_EPROTO; /* it said that there is one */
        }
        if (r->n < 8)
            r->times[r->n++] = llmcb_loop_now(llmcb_task_loop(t));
        strcat(r->text, chunk->text.len ? chunk->text.ptr : "-");
    }
    LLMCB_END(t);
}

TEST(await_chunk_reads_a_stream)
{
    counter c;
    llmcb_loop *loop;
    llmcb_chat *chat;
    chunk_reader r;
    llmcb_op *op;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    chat = stream_chat(loop, 10);
    memset(&r, 0, sizeof r);
    r.stream = stream_start(chat);
    op = llmcb_task_start(loop, chunk_step, 0, &r);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(r.code, LLMCB_OK);
    CHECK_STR(r.text, "onetwothree-");
    CHECK(r.n == 4 && r.times[0] == 10 && r.times[1] == 20 &&
          r.times[2] == 30 && r.times[3] == 40);
    CHECK_INT(llmcb_op_code(r.stream), LLMCB_OK);
    /* at the end there is nothing to wait for */
    llmcb_op_free(op);
    memset(r.text, 0, sizeof r.text);
    op = llmcb_task_start(loop, chunk_step, 0, &r);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r.text, "");
    llmcb_op_free(op);
    llmcb_op_free(r.stream);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
    CHECK(!c.wrong_size);
}

static llmcb_step first_chunk_step(llmcb_task *t)
{
    chunk_reader *r = (chunk_reader *)t->self;
    const llmcb_chunk *chunk;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_chunk(t, r->stream));
    if (!llmcb_op_next(r->stream, &chunk)) return LLMCB_EPROTO;
    strcat(r->text, chunk->text.ptr);
    r->n = 1;
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    LLMCB_END(t);
}

/* A later await of one that has read takes nothing from who reads now. */
TEST(await_chunk_goes_on_with_another_reader)
{
    llmcb_loop *loop = virtual_loop();
    llmcb_chat *chat = stream_chat(loop, 10);
    chunk_reader a, b;
    llmcb_op *first, *second;
    int i;

    memset(&a, 0, sizeof a);
    a.stream = stream_start(chat);
    b = a;
    first = llmcb_task_start(loop, first_chunk_step, 0, &a);
    while (!a.n) llmcb_loop_run_once(loop, LLMCB_FOREVER);
    second = llmcb_task_start(loop, chunk_step, 0, &b);
    for (i = 0; i < 50; i++) llmcb_loop_run_once(loop, 10);
    CHECK(llmcb_op_done(first) && llmcb_op_done(second));
    CHECK_STR(a.text, "one");
    CHECK_STR(b.text, "twothree-");
    llmcb_op_free(first);
    llmcb_op_free(second);
    llmcb_op_free(a.stream);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

static llmcb_step arm_chunk(llmcb_task *t, void *arg)
{
    return llmcb_await_chunk(t, (llmcb_op *)arg);
}

TEST(await_chunk_of_what_has_none)
{
    llmcb_loop *loop = virtual_loop(), *other = virtual_loop();
    llmcb_chat *chat = stream_chat(loop, 10);
    chunk_reader r;
    llmcb_message m;
    llmcb_op *op, *task, *generate;
    once o;
    part p;

    part_set(&p, 1, LLMCB_OK);
    task = llmcb_task_start(loop, part_step, 0, &p);
    CHECK_INT(once_run(loop, arm_chunk, NULL), LLMCB_ENOMEM);
    CHECK_INT(once_run(loop, arm_chunk, task), LLMCB_EINVAL);
    /* one reader at a time; the one that reads is not disturbed */
    memset(&r, 0, sizeof r);
    r.stream = stream_start(chat);
    op = llmcb_task_start(loop, chunk_step, 0, &r);
    turns(loop, 1);
    CHECK_INT(once_run(loop, arm_chunk, r.stream), LLMCB_EBUSY);
    CHECK_INT(once_run(other, arm_chunk, r.stream), LLMCB_EINVAL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r.text, "onetwothree-");
    llmcb_op_free(op);
    llmcb_op_free(r.stream);
    /* a call that is not read in chunks has none: at once, or never later
     * than its end */
    memset(&m, 0, sizeof m);
    m.content = "hello";
    generate = llmcb_chat_generate(chat, &m, 1, NULL);
    op = once_start(loop, &o, arm_chunk, generate);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(o.result, LLMCB_OK);
    llmcb_op_free(op);
    llmcb_op_free(generate);
    llmcb_op_free(task);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(llmcb_loop_free(other), LLMCB_OK);
}

/* The stream is cancelled, or freed, while somebody waits for its next
 * chunk: it is the end of the stream, or of the wait. */
TEST(await_chunk_of_a_stream_that_ends_early)
{
    int how;

    for (how = 0; how < 2; how++) {
        counter c;
        llmcb_loop *loop;
        llmcb_chat *chat;
        chunk_reader r;
        llmcb_op *op;

        counter_init(&c);
        loop = loop_with(&c, true, 2);
        chat = stream_chat(loop, 1000);
        memset(&r, 0, sizeof r);
        r.stream = stream_start(chat);
        op = llmcb_task_start(loop, chunk_step, 0, &r);
        while (r.n < 2) llmcb_loop_run_once(loop, LLMCB_FOREVER);
        if (how == 0) {
            llmcb_op_cancel(r.stream);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_INT(r.code, LLMCB_OK);
            CHECK_INT(llmcb_op_code(r.stream), LLMCB_ECANCELLED);
            llmcb_op_free(r.stream);
        } else {
            llmcb_op_free(r.stream);
            r.stream = NULL; /* it looks at it no more */
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK(r.code == LLMCB_ECANCELLED || r.code == LLMCB_OK);
        }
        CHECK_STR(r.text, "onetwo");
        llmcb_op_free(op);
        llmcb_chat_free(chat);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
    }
}

/* ---- step functions ----------------------------------------------------- */

enum { FRAME_MAX = 5000 };

typedef struct framed {
    size_t size;
    bool zeroed, aligned, kept;
} framed;

static llmcb_step frame_step(llmcb_task *t)
{
    framed *f = (framed *)t->self;
    unsigned char *bytes = (unsigned char *)t->frame;
    size_t i;

    LLMCB_BEGIN(t);
    f->zeroed = true;
    for (i = 0; i < f->size; i++)
        if (bytes[i]) f->zeroed = false;
    f->aligned = ((uintptr_t)t->frame & 15) == 0;
    for (i = 0; i < f->size; i++) bytes[i] = (unsigned char)(i * 7 + 1);
    LLMCB_AWAIT(t, llmcb_sleep(t, 3));
    LLMCB_AWAIT(t, llmcb_await(t, NULL));
    f->kept = true;
    for (i = 0; i < f->size; i++)
        if (bytes[i] != (unsigned char)(i * 7 + 1)) f->kept = false;
    LLMCB_END(t);
}

TEST(frames_are_zeroed_aligned_and_kept)
{
    static const size_t sizes[] = { 0, 1, 8, 15, 16, 17, 100, FRAME_MAX };
    counter c;
    llmcb_loop *loop;
    size_t i;

    counter_init(&c); /* its memory is not zeroed by itself */
    loop = loop_with(&c, true, 2);
    for (i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        framed f = { 0, false, false, false };
        llmcb_op *op;
        f.size = sizes[i];
        op = llmcb_task_start(loop, frame_step, f.size, &f);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK(f.zeroed && f.aligned && f.kept);
        llmcb_op_free(op);
    }
    /* more than there can be */
    CHECK(!llmcb_task_start(loop, frame_step, SIZE_MAX, NULL));
    CHECK(!llmcb_task_start(loop, frame_step, SIZE_MAX - 64, NULL));
    CHECK(!llmcb_loop_alive(loop));
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

static llmcb_step ends_with(llmcb_task *t)
{
    return *(const int *)t->self;
}

TEST(what_a_step_returns_is_the_code)
{
    static const struct {
        int returns;
        llmcb_code want;
    } rows[] = { { LLMCB_DONE, LLMCB_OK },   { LLMCB_EIO, LLMCB_EIO },
                 { LLMCB_EFORK, LLMCB_EFORK },
                 { LLMCB_ECANCELLED, LLMCB_ECANCELLED },
                 { LLMCB_WAIT, LLMCB_ESTATE }, /* but nothing is armed */
                 { 2, LLMCB_ESTATE } };
    llmcb_loop *loop = virtual_loop();
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int returns = rows[i].returns;
        llmcb_op *op = llmcb_task_start(loop, ends_with, 0, &returns);
        CHECK(!llmcb_op_done(op));
        CHECK_INT(llmcb_op_code(op), LLMCB_EBUSY);
        CHECK_INT(llmcb_op_error(op)->code, LLMCB_OK);
        CHECK_INT(llmcb_op_wait(op), rows[i].want);
        CHECK(llmcb_op_done(op));
        CHECK_INT(llmcb_op_code(op), rows[i].want);
        CHECK_INT(llmcb_op_error(op)->code, rows[i].want);
        CHECK(llmcb_op_error(op)->message[0]);
        llmcb_op_free(op);
    }
    CHECK(llmcb_op_done(NULL));
    CHECK_INT(llmcb_op_code(NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_op_error(NULL)->code, LLMCB_ENOMEM);
    llmcb_op_cancel(NULL);
    llmcb_op_free(NULL);
    CHECK(llmcb_task_loop(NULL) == NULL);
    llmcb_loop_free(loop);
}

/* A code that is none of the library's must not become one that means
 * something else, nor crash. */
TEST(what_a_step_returns_may_be_no_code)
{
    static const int rows[] = { -23, -1000, INT_MIN + 1, INT_MIN };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int status = 0;
        pid_t pid = fork(); /* a sanitizer may end it */

        REQUIRE(pid >= 0);
        if (pid == 0) {
            llmcb_loop *loop = virtual_loop();
            int returns = rows[i];
            llmcb_op *op = llmcb_task_start(loop, ends_with, 0, &returns);
            llmcb_code code;
            alarm(20);
            code = llmcb_op_wait(op);
            test_exit(code < 0 && code != LLMCB_ENOMEM ? 0 : 1);
        }
        REQUIRE(waitpid(pid, &status, 0) == pid);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            TEST_FAIL("%d: status %d", rows[i], status);
    }
}

static llmcb_step lost_step(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    t->at = 1; /* no await stands there */
    return llmcb_sleep(t, 1);
    LLMCB_END(t);
}

static llmcb_step nested_step(llmcb_task *t)
{
    int *steps = (int *)t->self;

    LLMCB_BEGIN(t);
    switch (++*steps) {
    case 1:
        LLMCB_AWAIT(t, llmcb_sleep(t, 1));
        ++*steps;
        break;
    default: break;
    }
    LLMCB_END(t);
}

TEST(a_lost_resume_point_is_told)
{
    llmcb_loop *loop = virtual_loop();
    int steps = 0;
    llmcb_op *op = llmcb_task_start(loop, lost_step, 0, NULL);

    CHECK_INT(llmcb_op_wait(op), LLMCB_ESTATE);
    llmcb_op_free(op);
    op = llmcb_task_start(loop, nested_step, 0, &steps);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ESTATE);
    CHECK_INT(steps, 1);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

static llmcb_step plain_step(llmcb_task *t)
{
    int *n = (int *)t->frame;

    switch (t->at) {
    case 0:
        *n = 1;
        t->at = 1;
        return llmcb_sleep(t, 10);
    case 1:
        if (++*n < 5) return llmcb_sleep(t, 10);
        t->at = 2;
        return llmcb_sleep(t, 5);
    default:
        *(int *)t->self = *n;
        return LLMCB_DONE;
    }
}

TEST(a_step_function_without_the_macros)
{
    llmcb_loop *loop = virtual_loop();
    int n = 0;
    llmcb_op *op = llmcb_task_start(loop, plain_step, sizeof(int), &n);

    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(n, 5);
    CHECK_INT(llmcb_loop_now(loop), 45);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* It arms something and ends all the same: that is taken back. */
typedef struct armed {
    probe p;
    int steps;
} armed;

static llmcb_step armed_step(llmcb_task *t)
{
    armed *a = (armed *)t->self;

    a->steps++;
    (void)probe_arm(t, &a->p);
    return LLMCB_DONE;
}

TEST(ending_with_an_await_armed_takes_it_back)
{
    int at;

    for (at = 0; at <= AT_N; at++) {
        counter c;
        llmcb_loop *loop;
        gate g = GATE_INIT;
        part others[2];
        llmcb_chat *chat = NULL;
        llmcb_op *op;
        armed a;
        fd_row r = { -1, LLMCB_READ, LLMCB_FOREVER };
        int i;

        counter_init(&c);
        loop = loop_with(&c, true, 2);
        memset(&a, 0, sizeof a);
        a.p.at = at;
        a.p.g = &g;
        REQUIRE(pipe(a.p.fds) == 0);
        for (i = 0; i < 2; i++) {
            part_set(&others[i], 50, LLMCB_OK);
            a.p.others[i] = llmcb_task_start(loop, part_step, 0, &others[i]);
        }
        if (at == AT_CHUNK) {
            chat = stream_chat(loop, 10);
            a.p.stream = stream_start(chat);
        }
        op = llmcb_task_start(loop, armed_step, 0, &a);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        gate_set(&g, 1);
        CHECK(write(a.p.fds[1], "x", 1) == 1);
        llmcb_op_free(op); /* what still points to it is now found */
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        CHECK_INT(a.steps, 1);
        r.fd = a.p.fds[0];
        CHECK_INT(once_run(loop, arm_fd, &r), LLMCB_OK);
        for (i = 0; i < 2; i++) llmcb_op_free(a.p.others[i]);
        llmcb_op_free(a.p.stream);
        llmcb_chat_free(chat);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
        close(a.p.fds[0]);
        close(a.p.fds[1]);
    }
}

/* Two awaits armed in one step: the last one counts, alone. */
static llmcb_step twice_step(llmcb_task *t)
{
    int *codes = (int *)t->self;

    switch (t->at) {
    case 0:
        t->at = 1;
        (void)llmcb_sleep(t, 5);
        return llmcb_sleep(t, 20);
    case 1:
        codes[0] = t->result;
        codes[1] = (int)llmcb_loop_now(llmcb_task_loop(t));
        t->at = 2;
        (void)llmcb_await(t, NULL);
        return llmcb_sleep(t, 20);
    default:
        codes[2] = t->result;
        codes[3] = (int)llmcb_loop_now(llmcb_task_loop(t));
        return LLMCB_DONE;
    }
}

TEST(two_awaits_in_one_step)
{
    llmcb_loop *loop = virtual_loop();
    int codes[4] = { 1, 1, 1, 1 };
    llmcb_op *op = llmcb_task_start(loop, twice_step, 0, codes);

    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(codes[0], LLMCB_OK);
    CHECK_INT(codes[1], 20);
    CHECK_INT(codes[2], LLMCB_OK);
    CHECK_INT(codes[3], 40);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* ---- without a coroutine ------------------------------------------------- */

static int never_run;

static int never(void *arg)
{
    (void)arg;
    return ++never_run;
}

/* NULL for the coroutine: each await says what it always says, and nothing
 * else comes of it. */
TEST(awaits_of_no_coroutine)
{
    counter c;
    llmcb_loop *loop;
    llmcb_op *ops[2];
    part p[2];
    int fds[2], i;

    REQUIRE(pipe(fds) == 0);
    counter_init(&c);
    loop = loop_with(&c, true, 2);
    for (i = 0; i < 2; i++) {
        part_set(&p[i], 10, LLMCB_OK);
        ops[i] = llmcb_task_start(loop, part_step, 0, &p[i]);
    }
    never_run = 0;
    for (i = 0; i < 3; i++) { /* before them, while they sleep, when done */
        CHECK_INT(llmcb_sleep(NULL, 0), LLMCB_WAIT);
        CHECK_INT(llmcb_sleep(NULL, 5), LLMCB_WAIT);
        CHECK_INT(llmcb_sleep(NULL, LLMCB_FOREVER), LLMCB_WAIT);
        CHECK_INT(llmcb_await_fd(NULL, fds[0], LLMCB_READ, 5), LLMCB_WAIT);
        CHECK_INT(llmcb_await_fd(NULL, -1, 0, LLMCB_FOREVER), LLMCB_WAIT);
        CHECK_INT(llmcb_await(NULL, ops[0]), LLMCB_WAIT);
        CHECK_INT(llmcb_await(NULL, NULL), LLMCB_WAIT);
        CHECK_INT(llmcb_await_all(NULL, ops, 2, LLMCB_FOREVER), LLMCB_WAIT);
        CHECK_INT(llmcb_await_all(NULL, NULL, 0, 5), LLMCB_WAIT);
        CHECK_INT(llmcb_await_any(NULL, ops, 2, 5), LLMCB_WAIT);
        CHECK_INT(llmcb_await_any(NULL, NULL, 2, 5), LLMCB_WAIT);
        CHECK_INT(llmcb_await_chunk(NULL, ops[0]), LLMCB_WAIT);
        CHECK_INT(llmcb_await_chunk(NULL, NULL), LLMCB_WAIT);
        CHECK_INT(llmcb_await_run(NULL, NULL), LLMCB_WAIT);
        CHECK_INT(llmcb_await_run(NULL, llmcb_op_run(ops[0])), LLMCB_WAIT);
        CHECK_INT(llmcb_await_blocking(NULL, never, NULL), LLMCB_WAIT);
        CHECK_INT(llmcb_await_blocking(NULL, NULL, NULL), LLMCB_WAIT);
        if (i == 0) CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
        if (i == 1) CHECK_INT(llmcb_op_wait(ops[1]), LLMCB_OK);
    }
    CHECK_INT(llmcb_op_wait(ops[0]), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(loop), 10);
    for (i = 0; i < 2; i++) {
        CHECK_INT(p[i].result, LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(never_run, 0);
    CHECK_INT(c.live, 0);
    close(fds[0]);
    close(fds[1]);
}

/* ---- the life of operations --------------------------------------------- */

typedef struct suicide {
    llmcb_op *op;
    int awaits; /* before it ends */
    llmcb_code codes[3];
    int n;
} suicide;

static llmcb_step suicide_step(llmcb_task *t)
{
    suicide *s = (suicide *)t->self;

    LLMCB_BEGIN(t);
    llmcb_op_free(s->op);
    while (s->n < s->awaits) {
        LLMCB_AWAIT(t, llmcb_sleep(t, 10));
        s->codes[s->n++] = t->result;
    }
    LLMCB_END(t);
}

static llmcb_step arm_op_of(llmcb_task *t, void *arg)
{
    return llmcb_await(t, ((const suicide *)arg)->op);
}

TEST(a_coroutine_frees_itself)
{
    int awaits;

    for (awaits = 0; awaits < 4; awaits++) {
        counter c;
        llmcb_loop *loop;
        suicide s;
        once o;
        llmcb_op *by;
        long live;

        counter_init(&c);
        loop = loop_with(&c, true, 2);
        CHECK_INT(once_run(loop, arm_op, NULL), LLMCB_ENOMEM);
        live = c.live;
        memset(&s, 0, sizeof s);
        s.awaits = awaits;
        by = once_start(loop, &o, arm_op_of, &s); /* waits before it runs */
        s.op = llmcb_task_start(loop, suicide_step, 0, &s);
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        CHECK_INT(o.result, LLMCB_ECANCELLED);
        CHECK_INT(s.n, awaits);
        if (awaits > 0) CHECK_INT(s.codes[0], LLMCB_ECANCELLED);
        if (awaits > 1) CHECK_INT(s.codes[1], LLMCB_OK);
        if (awaits > 2) CHECK_INT(s.codes[2], LLMCB_OK);
        llmcb_op_free(by);
        CHECK_INT(c.live, live); /* freed now, not with the loop */
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
    }
}

/* A done operation is freed inside a callback, by one that waited for it. */
static llmcb_step free_after_step(llmcb_task *t)
{
    llmcb_op **op = (llmcb_op **)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await(t, *op));
    llmcb_op_free(*op);
    *op = NULL;
    LLMCB_END(t);
}

TEST(a_waiter_frees_what_it_waited_for)
{
    counter c;
    llmcb_loop *loop;
    part p;
    once o;
    llmcb_op *op, *a, *b;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    part_set(&p, 5, LLMCB_EIO);
    op = llmcb_task_start(loop, part_step, 0, &p);
    b = once_start(loop, &o, arm_op, op);
    a = llmcb_task_start(loop, free_after_step, 0, &op);
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK(op == NULL);
    CHECK_INT(o.result, LLMCB_EIO);
    llmcb_op_free(a);
    llmcb_op_free(b);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

/* ... while the program waits for it, too: that still learns how it ended. */
TEST(a_waiter_frees_what_the_program_waits_for)
{
    counter c;
    llmcb_loop *loop;
    part p;
    llmcb_op *op, *mine, *a;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    part_set(&p, 5, LLMCB_EIO);
    mine = op = llmcb_task_start(loop, part_step, 0, &p);
    a = llmcb_task_start(loop, free_after_step, 0, &op);
    CHECK_INT(llmcb_op_wait(mine), LLMCB_EIO);
    CHECK(op == NULL); /* and with it `mine` is gone */
    llmcb_op_free(a);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

/* Both sleep as long: when the first runs, the second's time is over, too. A
 * cancel does not undo that; the next await says it. */
typedef struct pair_of {
    llmcb_op *other;
    llmcb_code first, second;
} pair_of;

static llmcb_step cancels_other(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 10));
    llmcb_op_cancel(((pair_of *)t->self)->other);
    LLMCB_END(t);
}

static llmcb_step is_cancelled(llmcb_task *t)
{
    pair_of *p = (pair_of *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 10));
    p->first = t->result;
    LLMCB_AWAIT(t, llmcb_sleep(t, 10));
    p->second = t->result;
    LLMCB_END(t);
}

TEST(cancelled_as_its_await_is_over)
{
    llmcb_loop *loop = virtual_loop();
    pair_of p = { NULL, (llmcb_code)1, (llmcb_code)1 };
    llmcb_op *a = llmcb_task_start(loop, cancels_other, 0, &p);

    p.other = llmcb_task_start(loop, is_cancelled, 0, &p);
    llmcb_op_wait(p.other);
    CHECK_INT(p.first, LLMCB_OK);
    CHECK_INT(p.second, LLMCB_ECANCELLED);
    CHECK_INT(llmcb_loop_now(loop), 10);
    llmcb_op_free(a);
    llmcb_op_free(p.other);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

TEST(a_thousand_coroutines)
{
    enum { N = 1000 };
    static part p[N];
    static llmcb_op *ops[N];
    counter c;
    llmcb_loop *loop;
    int i, wrong = 0;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    for (i = 0; i < N; i++) {
        part_set(&p[i], (i * 7919) % 1000, i % 5 ? LLMCB_OK : LLMCB_EIO);
        ops[i] = llmcb_task_start(loop, part_step, (size_t)i % 100, &p[i]);
    }
    CHECK(llmcb_loop_alive(loop));
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK(!llmcb_loop_alive(loop));
    CHECK_INT(llmcb_loop_now(loop), 999);
    for (i = 0; i < N; i++) {
        if (llmcb_op_code(ops[i]) != p[i].code || p[i].ended != 1) wrong++;
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(wrong, 0);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

/* A tree: each starts two more and waits for them. */
typedef struct node {
    llmcb_op *children[2];
    int depth;
} node;

static int leaves, nodes_cancelled;

static llmcb_step node_step(llmcb_task *t)
{
    node *n = (node *)t->frame;
    int i;

    LLMCB_BEGIN(t);
    n->depth = (int)(intptr_t)t->self;
    if (n->depth == 0) {
        LLMCB_AWAIT(t, llmcb_sleep(t, 3));
        if (t->result == LLMCB_OK) leaves++;
        return t->result;
    }
    for (i = 0; i < 2; i++)
        n->children[i] =
            llmcb_task_start(llmcb_task_loop(t), node_step, sizeof(node),
                             (void *)(intptr_t)(n->depth - 1));
    LLMCB_AWAIT(t, llmcb_await_all(t, n->children, 2, LLMCB_FOREVER));
    if (t->result == LLMCB_ECANCELLED) nodes_cancelled++;
    for (i = 0; i < 2; i++) llmcb_op_free(n->children[i]);
    return t->result;
    LLMCB_END(t);
}

TEST(coroutines_start_coroutines)
{
    counter c;
    llmcb_loop *loop;
    llmcb_op *op;
    int how;

    for (how = 0; how < 3; how++) {
        counter_init(&c);
        loop = loop_with(&c, true, 2);
        leaves = nodes_cancelled = 0;
        op = llmcb_task_start(loop, node_step, sizeof(node),
                              (void *)(intptr_t)8);
        if (how == 0) {
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_INT(leaves, 256);
        } else {
            turns(loop, 2); /* 16 rounds: all stand */
        }
        if (how == 1) { /* the root frees its children, they theirs */
            llmcb_op_cancel(op);
            CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
            CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
            CHECK_INT(leaves, 0);
            CHECK(nodes_cancelled > 8);
        }
        if (how != 2) llmcb_op_free(op);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        if (how == 2) CHECK_INT(leaves, 0);
        CHECK_INT(c.live, 0);
        CHECK(!c.wrong_size);
    }
}

/* An operation that was never given back is freed with its loop. */
TEST(the_loop_frees_what_is_left)
{
    counter c;
    llmcb_loop *loop;
    part p[3];
    int i;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    for (i = 0; i < 3; i++) {
        part_set(&p[i], i * 10, LLMCB_EIO);
        llmcb_task_start(loop, part_step, 100, &p[i]);
    }
    llmcb_loop_run_once(loop, 0);
    llmcb_loop_run_once(loop, 0);
    CHECK_INT(p[0].ended, 1); /* done, not freed */
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(p[2].ended, 1);
    CHECK_INT(p[2].result, LLMCB_ECANCELLED);
    CHECK_INT(c.live, 0);
}

int main(int argc, char **argv)
{
    alarm(60); /* what hangs is killed */
    return test_main(argc, argv);
}
