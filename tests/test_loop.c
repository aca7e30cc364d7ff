/* The loop: timers, both clocks, posts, wake-ups, threads, fork, its end and
 * the four ways to drive it. It must also pass with -DLLMCB_NO_EPOLL.
 *
 * Nothing here measures time. Where a test needs the real clock it replaces
 * clock_gettime, and the loop's wait then moves that clock by what it would
 * have waited. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_KIT -DLLMCB_NO_SOCKETS */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef LLMCB_NO_CURL
#define LLMCB_NO_CURL
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__) && !defined(LLMCB_NO_EPOLL)
#include <sys/epoll.h>
#endif

/* ---- system calls that the tests count, replace or make fail ------------ */

static pthread_mutex_t hook_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t hook_cond = PTHREAD_COND_INITIALIZER;
static int waits;           /* calls of poll or epoll_wait */
static int longest;         /* their longest timeout; INT_MAX: no limit */
static bool waiting;        /* the loop is in a wait that may block */
static bool fake_on;        /* the clock is fake_ns */
static int64_t fake_ns;
static int64_t fake_step;   /* what each look at the clock takes */
static int sys_left = -1;   /* calls until one fails; -1: none does */
static int sys_errno;

static bool sys_fails(void)
{
    if (sys_left < 0 || sys_left-- > 0) return false;
    errno = sys_errno;
    return true;
}

/* What to wait for really. */
static int wait_begins(int ms)
{
    pthread_mutex_lock(&hook_mutex);
    waits++;
    if (ms < 0) longest = INT_MAX;
    else if (ms > longest) longest = ms;
    waiting = ms != 0;
    pthread_cond_broadcast(&hook_cond);
    pthread_mutex_unlock(&hook_mutex);
    return fake_on && ms > 0 ? 0 : ms;
}

static int wait_ends(int ms, int got)
{
    pthread_mutex_lock(&hook_mutex);
    waiting = false;
    pthread_mutex_unlock(&hook_mutex);
    if (fake_on && ms > 0 && got == 0) fake_ns += ms * (int64_t)1000000;
    return got;
}

static bool interrupted; /* the next rest, by a signal */

static int hook_poll(struct pollfd *fds, nfds_t n, int ms)
{
    if (n == 1 && ms == 1 && interrupted) {
        interrupted = false;
        waits++;
        errno = EINTR;
        return -1;
    }
    return wait_ends(ms, poll(fds, n, wait_begins(ms)));
}

#if defined(__linux__) && !defined(LLMCB_NO_EPOLL)
static int hook_epoll_wait(int fd, struct epoll_event *ev, int n, int ms)
{
    return wait_ends(ms, epoll_wait(fd, ev, n, wait_begins(ms)));
}

static int hook_epoll_create1(int flags)
{
    return sys_fails() ? -1 : epoll_create1(flags);
}

static int hook_epoll_ctl(int fd, int op, int of, struct epoll_event *ev)
{
    return sys_fails() ? -1 : epoll_ctl(fd, op, of, ev);
}
#endif

static int hook_clock_gettime(clockid_t id, struct timespec *ts)
{
    if (!fake_on) return clock_gettime(id, ts);
    fake_ns += fake_step;
    ts->tv_sec = (time_t)(fake_ns / 1000000000);
    ts->tv_nsec = (long)(fake_ns % 1000000000);
    return 0;
}

static int hook_pipe(int fds[2])
{
    return sys_fails() ? -1 : pipe(fds);
}

static int hook_open(const char *path, int flags, ...)
{
    return sys_fails() ? -1 : open(path, flags, 0600);
}

static int hook_fcntl(int fd, int cmd, ...)
{
    va_list args;
    int arg;

    if (sys_fails()) return -1;
    if (cmd == F_GETFL || cmd == F_GETFD) return fcntl(fd, cmd);
    va_start(args, cmd);
    arg = va_arg(args, int);
    va_end(args);
    return fcntl(fd, cmd, arg);
}

/* A call without a hook stays what it is. */
#define HOOK_poll 0, hook_poll
#define HOOK_epoll_wait 0, hook_epoll_wait
#define HOOK_epoll_create1 0, hook_epoll_create1
#define HOOK_epoll_ctl 0, hook_epoll_ctl
#define HOOK_clock_gettime 0, hook_clock_gettime
#define HOOK_pipe 0, hook_pipe
#define HOOK_open 0, hook_open
#define HOOK_fcntl 0, hook_fcntl
#define SECOND_(a, b, ...) b
#define SECOND(...) SECOND_(__VA_ARGS__)
#define LLMCBI_SYS(call) SECOND(HOOK_##call, call, 0)

#define LLMCB_IMPLEMENTATION
#include "../llmcb.h"
#include "test.h"

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
    size_t *from = ptr ? (size_t *)ptr - 2 : NULL, *to = NULL;

    pthread_mutex_lock(&c->mutex);
    if (from && from[0] != old) c->wrong_size = true;
    if (size) {
        long at = c->made++;
        bool fail = c->fail_at >= 0 &&
                    (c->forever ? at >= c->fail_at : at == c->fail_at);
        if (fail) c->failed = true;
        else to = (size_t *)malloc(size + 2 * sizeof *to);
        if (!to) {
            pthread_mutex_unlock(&c->mutex);
            return NULL;
        }
        memset(to, 0xA5, size + 2 * sizeof *to);
        to[0] = size;
        if (from) memcpy(to + 2, ptr, old < size ? old : size);
    }
    c->live += (to ? 1 : 0) - (from ? 1 : 0);
    pthread_mutex_unlock(&c->mutex);
    /* never in place, so that a stale pointer is found */
    free(from);
    return to ? to + 2 : NULL;
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

static void fake_begin(int64_t ns, int64_t step)
{
    fake_on = true;
    fake_ns = (int64_t)100000 * 1000000 + ns;
    fake_step = step;
}

static void fake_end(void)
{
    fake_on = false;
}

static void waits_reset(void)
{
    waits = longest = 0;
}

/* How many descriptors are open, and which; -1: the system does not tell. */
static int list_fds(bool *open_fds, int max)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *e;
    int n = 0;

    if (!dir) return -1;
    while ((e = readdir(dir)) != NULL) {
        int fd = atoi(e->d_name);
        if (e->d_name[0] == '.' || fd == dirfd(dir)) continue;
        if (fd < max) open_fds[fd] = true;
        n++;
    }
    closedir(dir);
    return n;
}

static int count_fds(void)
{
    return list_fds(NULL, 0);
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

static void gate_wait(gate *g, int least)
{
    pthread_mutex_lock(&g->mutex);
    while (g->value < least) pthread_cond_wait(&g->cond, &g->mutex);
    pthread_mutex_unlock(&g->mutex);
}

static void until_waiting(void)
{
    pthread_mutex_lock(&hook_mutex);
    while (!waiting) pthread_cond_wait(&hook_cond, &hook_mutex);
    pthread_mutex_unlock(&hook_mutex);
}

/* A transcript. */
static char script[4096];

static void say(const char *what)
{
    size_t used = strlen(script);

    snprintf(script + used, sizeof script - used, "%s%s", used ? " " : "",
             what);
}

static void say_post(void *arg)
{
    say((const char *)arg);
}

/* A coroutine that sleeps and says its name. */
typedef struct sleeper {
    const char *name;
    int64_t ms;
    int64_t woke; /* on the loop's clock */
    llmcb_code result;
    int *count; /* of those that woke; NULL: nobody asks */
    int order;
} sleeper;

static llmcb_step sleeper_step(llmcb_task *t)
{
    sleeper *s = (sleeper *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, s->ms));
    s->result = t->result;
    s->woke = llmcb_loop_now(llmcb_task_loop(t));
    if (s->count) s->order = ++*s->count;
    if (s->name) say(s->name);
    LLMCB_END(t);
}

static void sleeper_set(sleeper *s, const char *name, int64_t ms)
{
    memset(s, 0, sizeof *s);
    s->name = name;
    s->ms = ms;
    s->woke = -1;
    s->result = (llmcb_code)1;
}

/* A coroutine that waits for a descriptor and says so. */
typedef struct reader {
    int fd, events;
    int64_t ms;
    llmcb_code result;
} reader;

static llmcb_step reader_step(llmcb_task *t)
{
    reader *r = (reader *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_fd(t, r->fd, r->events, r->ms));
    r->result = t->result;
    LLMCB_END(t);
}

static int gated_job(void *arg)
{
    gate_wait((gate *)arg, 1);
    return 0;
}

static int quick_job(void *arg)
{
    (void)arg;
    return 0;
}

/* ---- timers ------------------------------------------------------------- */

TEST(timers_run_in_order_and_ties_as_they_were_armed)
{
    static const struct {
        const char *name;
        int64_t ms;
    } rows[] = { { "a30", 30 }, { "b10", 10 }, { "c20", 20 }, { "d10", 10 },
                 { "e0", 0 },   { "f30", 30 }, { "g0", 0 },   { "h10", 10 },
                 { "i-", -7 } };
    enum { N = sizeof rows / sizeof rows[0] };
    sleeper s[N];
    llmcb_op *ops[N];
    llmcb_loop *loop = virtual_loop();
    size_t i;

    script[0] = '\0';
    for (i = 0; i < N; i++) {
        sleeper_set(&s[i], rows[i].name, rows[i].ms);
        ops[i] = llmcb_task_start(loop, sleeper_step, 0, &s[i]);
    }
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK_STR(script, "e0 g0 i- b10 d10 h10 c20 a30 f30");
    for (i = 0; i < N; i++) {
        CHECK_INT(s[i].woke, rows[i].ms < 0 ? 0 : rows[i].ms);
        CHECK_INT(s[i].result, LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* Many, a third of them cancelled from the middle of the heap. */
TEST(timers_in_a_large_heap)
{
    enum { N = 1500 };
    static sleeper s[N];
    static llmcb_op *ops[N];
    static int by_order[N + 1];
    llmcb_loop *loop = virtual_loop();
    uint32_t x = 12345;
    int i, count = 0, woken = 0, last = -1;

    for (i = 0; i < N; i++) {
        x = x * 1664525u + 1013904223u;
        sleeper_set(&s[i], NULL, (x >> 8) % 400 + 1);
        s[i].count = &count;
        ops[i] = llmcb_task_start(loop, sleeper_step, 0, &s[i]);
    }
    /* all are armed, and nothing is due */
    CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(loop), 0);
    for (i = 0; i < N; i += 3) llmcb_op_cancel(ops[i]);
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    memset(by_order, -1, sizeof by_order);
    for (i = 0; i < N; i++) {
        REQUIRE(s[i].order > 0 && s[i].order <= N);
        by_order[s[i].order] = i;
        if (s[i].result == LLMCB_ECANCELLED) {
            CHECK(i % 3 == 0 && s[i].woke == 0);
        } else {
            woken++;
            CHECK_INT(s[i].result, LLMCB_OK);
            CHECK_INT(s[i].woke, s[i].ms);
        }
    }
    CHECK_INT(woken, N - N / 3);
    for (i = 1; i <= N; i++) {
        int k = by_order[i];
        if (k < 0 || s[k].result != LLMCB_OK) continue;
        if (last >= 0)
            CHECK(s[last].ms < s[k].ms ||
                  (s[last].ms == s[k].ms && last < k));
        last = k;
    }
    for (i = 0; i < N; i++) llmcb_op_free(ops[i]);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

static llmcb_step count_turns_step(llmcb_task *t)
{
    int *count = (int *)t->self;

    LLMCB_BEGIN(t);
    while (*count < 5) {
        LLMCB_AWAIT(t, llmcb_sleep(t, 0));
        ++*count;
    }
    LLMCB_END(t);
}

/* Else a coroutine that sleeps for nothing would starve the rest. */
TEST(a_sleep_of_0_ends_in_a_later_turn)
{
    llmcb_loop *loop = virtual_loop();
    int count = 0, i;
    llmcb_op *op = llmcb_task_start(loop, count_turns_step, 0, &count);

    for (i = 0; i <= 5; i++) {
        CHECK_INT(count, i ? i - 1 : 0);
        llmcb_loop_run_once(loop, 0);
    }
    CHECK_INT(count, 5);
    CHECK(llmcb_op_done(op));
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* On the real clock: from the call of llmcb_sleep until it goes on. */
typedef struct exact {
    int64_t ms, work_ns, from, to;
} exact;

static llmcb_step exact_step(llmcb_task *t)
{
    exact *e = (exact *)t->self;

    LLMCB_BEGIN(t);
    fake_ns += e->work_ns;
    e->from = fake_ns;
    LLMCB_AWAIT(t, llmcb_sleep(t, e->ms));
    e->to = fake_ns;
    LLMCB_END(t);
}

static bool exact_run(exact *e, int64_t offset, int64_t step)
{
    llmcb_loop *loop;
    llmcb_op *op;
    bool ok;

    fake_begin(offset, step);
    loop = loop_with(NULL, false, 0);
    op = llmcb_task_start(loop, exact_step, 0, e);
    ok = llmcb_op_wait(op) == LLMCB_OK;
    llmcb_op_free(op);
    ok = llmcb_loop_free(loop) == LLMCB_OK && ok;
    fake_end();
    return ok;
}

/* Wherever within a millisecond it begins, and whatever the way there
 * takes: the clock's fraction must not count as time that has passed. */
TEST(timers_are_never_early)
{
    static const int64_t steps[] = { 0, 100000, 350000, 900000 };
    static const int64_t sleeps[] = { 0, 1, 2, 20, 1000 };
    int64_t offset;
    size_t k, m;

    for (offset = 0; offset < 1000000; offset += 49999)
        for (k = 0; k < 4; k++)
            for (m = 0; m < 5; m++) {
                exact e = { 0, 0, 0, 0 };
                e.ms = sleeps[m];
                CHECK(exact_run(&e, offset, steps[k]));
                if (e.to - e.from < e.ms * 1000000)
                    TEST_FAIL("%d ms took %lld ns", (int)e.ms,
                              (long long)(e.to - e.from));
                /* nor late: one for the fraction, and its own steps */
                if (e.to - e.from > (e.ms + 2) * 1000000 + 6 * steps[k])
                    TEST_FAIL("%d ms took %lld ns", (int)e.ms,
                              (long long)(e.to - e.from));
            }
}

/* The turn's time is old when a step has worked for long before it sleeps;
 * what it has worked is no part of the sleep. */
TEST(timers_are_never_early_after_a_long_step)
{
    exact e = { 20, 50 * 1000000, 0, 0 };

    CHECK(exact_run(&e, 0, 0));
    if (e.to - e.from < 20 * 1000000)
        TEST_FAIL("20 ms took %lld ns", (long long)(e.to - e.from));
}

/* ---- the virtual clock -------------------------------------------------- */

TEST(virtual_clock_jumps)
{
    static const int64_t years = (int64_t)50 * 365 * 86400 * 1000;
    llmcb_loop *loop = virtual_loop();
    sleeper s;
    llmcb_op *op;

    CHECK_INT(llmcb_loop_now(loop), 0);
    sleeper_set(&s, NULL, years);
    op = llmcb_task_start(loop, sleeper_step, 0, &s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(s.woke, years);
    CHECK_INT(llmcb_loop_now(loop), years);
    llmcb_op_free(op);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* What must hold the clock back. Each row sets it up, then some turns must
 * not move the clock, then it is resolved. */
enum { HOLD_TASK, HOLD_POST, HOLD_FD, HOLD_JOB, HOLD_N };

static int spins;

static llmcb_step spin_step(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    while (spins-- > 0) {
        LLMCB_AWAIT(t, llmcb_await(t, NULL)); /* ends at once: ENOMEM */
    }
    say("spun");
    LLMCB_END(t);
}

static void spin_post(void *arg)
{
    if (spins-- > 0) llmcb_loop_post((llmcb_loop *)arg, spin_post, arg);
    else say("spun");
}

TEST(virtual_clock_waits_for_what_is_under_way)
{
    int what, i;

    for (what = 0; what < HOLD_N; what++) {
        llmcb_loop *loop = virtual_loop();
        gate g = GATE_INIT;
        int fds[2];
        reader r = { -1, LLMCB_READ, LLMCB_FOREVER, LLMCB_OK };
        sleeper s;
        llmcb_op *op, *hold = NULL;

        REQUIRE(pipe(fds) == 0);
        r.fd = fds[0];
        script[0] = '\0';
        spins = 40;
        sleeper_set(&s, "slept", 1000);
        op = llmcb_task_start(loop, sleeper_step, 0, &s);
        if (what == HOLD_TASK)
            hold = llmcb_task_start(loop, spin_step, 0, NULL);
        if (what == HOLD_POST) llmcb_loop_post(loop, spin_post, loop);
        if (what == HOLD_FD)
            hold = llmcb_task_start(loop, reader_step, 0, &r);
        if (what == HOLD_JOB) hold = llmcb_offload(loop, gated_job, &g);
        for (i = 0; i < 4; i++) {
            CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
            CHECK_INT(llmcb_loop_now(loop), 0);
        }
        CHECK(!llmcb_op_done(op));
        if (what == HOLD_FD) CHECK(write(fds[1], "x", 1) == 1);
        if (what == HOLD_JOB) gate_set(&g, 1);
        if (hold) {
            CHECK_INT(llmcb_loop_run_until(loop, hold), LLMCB_OK);
            CHECK_INT(llmcb_loop_now(loop), 0);
        }
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(llmcb_loop_now(loop), 1000);
        if (what == HOLD_TASK || what == HOLD_POST)
            CHECK_STR(script, "spun slept");
        llmcb_op_free(op);
        llmcb_op_free(hold);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        close(fds[0]);
        close(fds[1]);
    }
}

/* A job that is done is told of before time goes on. */
TEST(virtual_clock_job_results_come_before_timers)
{
    llmcb_loop *loop = virtual_loop();
    llmcb_op *ops[20], *op;
    sleeper s;
    int i;

    for (i = 0; i < 20; i++) {
        int64_t before = llmcb_loop_now(loop);
        sleeper_set(&s, NULL, 100);
        op = llmcb_task_start(loop, sleeper_step, 0, &s);
        ops[i] = llmcb_offload(loop, quick_job, NULL);
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        CHECK_INT(llmcb_loop_now(loop), before);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(llmcb_loop_now(loop), before + 100);
        llmcb_op_free(op);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

TEST(clock_advance)
{
    static const struct {
        int64_t ms;
        llmcb_code code;
        const char *said;
    } rows[] = { { 9, LLMCB_OK, "" },
                 { 1, LLMCB_OK, "a10" },
                 { -1, LLMCB_EINVAL, "a10" },
                 { INT64_MAX, LLMCB_EINVAL, "a10" },
                 { 0, LLMCB_OK, "a10" },
                 { 25, LLMCB_OK, "a10 b20 c30 d30" },
                 { 1000, LLMCB_OK, "a10 b20 c30 d30 e40" } };
    sleeper s[5];
    llmcb_op *ops[6];
    llmcb_loop *loop = virtual_loop();
    int64_t now = 0;
    reader r = { -1, LLMCB_READ, LLMCB_FOREVER, LLMCB_OK };
    int fds[2];
    size_t i;

    REQUIRE(pipe(fds) == 0);
    script[0] = '\0';
    sleeper_set(&s[0], "c30", 30);
    sleeper_set(&s[1], "a10", 10);
    sleeper_set(&s[2], "e40", 40);
    sleeper_set(&s[3], "b20", 20);
    sleeper_set(&s[4], "d30", 30);
    for (i = 0; i < 5; i++)
        ops[i] = llmcb_task_start(loop, sleeper_step, 0, &s[i]);
    r.fd = fds[0]; /* holds the clock */
    ops[5] = llmcb_task_start(loop, reader_step, 0, &r);
    CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        CHECK_INT(llmcb_clock_advance(loop, rows[i].ms), rows[i].code);
        if (rows[i].code == LLMCB_OK) now += rows[i].ms;
        CHECK_INT(llmcb_loop_now(loop), now);
        CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
        CHECK_STR(script, rows[i].said);
        CHECK_INT(llmcb_loop_now(loop), now);
    }
    for (i = 0; i < 6; i++) llmcb_op_free(ops[i]);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    loop = llmcb_loop_new(NULL);
    CHECK_INT(llmcb_clock_advance(loop, 1), LLMCB_ESTATE);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    close(fds[0]);
    close(fds[1]);
}

/* Sleeps for ever, again and again. */
static llmcb_step ages_step(llmcb_task *t)
{
    int *slept = (int *)t->self;

    LLMCB_BEGIN(t);
    while (*slept < 8) {
        LLMCB_AWAIT(t, llmcb_sleep(t, INT64_MAX));
        if (t->result != LLMCB_OK) return t->result;
        ++*slept;
    }
    LLMCB_END(t);
}

/* The end of time: nothing overflows, and no clock goes back. */
TEST(virtual_clock_has_an_end)
{
    static const int64_t years = (int64_t)50 * 365 * 86400 * 1000;
    llmcb_loop *loop = virtual_loop();
    int slept = 0, more = 0, i;
    llmcb_op *op = llmcb_task_start(loop, ages_step, 0, &slept);
    llmcb_op *late = NULL;
    int64_t before = 0, now;
    sleeper s;

    for (i = 0; i < 30; i++) {
        if (i == 10) late = llmcb_task_start(loop, ages_step, 0, &more);
        if (i > 20) llmcb_clock_advance(loop, i == 25 ? INT64_MAX : years);
        llmcb_loop_wakeup(loop); /* where there is nothing left to come */
        CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
        now = llmcb_loop_now(loop);
        if (now < before || now > INT64_MAX / 2)
            TEST_FAIL("turn %d: from %lld to %lld", i, (long long)before,
                      (long long)now);
        before = now;
    }
    CHECK(slept > 0);
    /* what is cancelled there ends, and a sleep of 0 */
    sleeper_set(&s, NULL, 0);
    llmcb_op_cancel(op);
    llmcb_op_cancel(late);
    llmcb_op_wait(op);
    llmcb_op_wait(late);
    llmcb_op_free(op);
    op = llmcb_task_start(loop, sleeper_step, 0, &s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(s.woke, before);
    llmcb_op_free(op);
    llmcb_op_free(late);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* ---- posts and wake-ups ------------------------------------------------- */

enum { POSTERS = 4, POSTS = 400 };

typedef struct poster {
    llmcb_loop *loop;
    gate *start;
    int next;   /* the number that is to arrive */
    int wrong;  /* arrived out of order */
    int failed;
    struct {
        struct poster *of;
        int number;
    } posts[POSTS];
} poster;

static int posts_run;

static void poster_arrive(void *arg)
{
    poster *p = *(poster **)arg;
    int number = *(int *)(void *)((char *)arg + sizeof p);

    if (number != p->next) p->wrong++;
    p->next = number + 1;
    posts_run++;
}

static void *poster_thread(void *arg)
{
    poster *p = (poster *)arg;
    int i;

    gate_wait(p->start, 1);
    for (i = 0; i < POSTS; i++) {
        p->posts[i].of = p;
        p->posts[i].number = i;
        if (llmcb_loop_post(p->loop, poster_arrive, &p->posts[i]) != LLMCB_OK)
            p->failed++;
    }
    return NULL;
}

TEST(posts_of_many_threads_all_run_in_order)
{
    static poster p[POSTERS];
    pthread_t threads[POSTERS];
    gate start = GATE_INIT;
    counter c;
    llmcb_loop *loop;
    int i;

    counter_init(&c);
    loop = loop_with(&c, false, 0);
    posts_run = 0;
    memset(p, 0, sizeof p);
    for (i = 0; i < POSTERS; i++) {
        p[i].loop = loop;
        p[i].start = &start;
        REQUIRE(!pthread_create(&threads[i], NULL, poster_thread, &p[i]));
    }
    gate_set(&start, 1);
    /* a lost wake-up would hang here */
    while (posts_run < POSTERS * POSTS)
        if (llmcb_loop_run_once(loop, LLMCB_FOREVER) != LLMCB_OK) break;
    CHECK_INT(posts_run, POSTERS * POSTS);
    for (i = 0; i < POSTERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK_INT(p[i].wrong, 0);
        CHECK_INT(p[i].failed, 0);
        CHECK_INT(p[i].next, POSTS);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

static void post_again(void *arg)
{
    say("first");
    CHECK_INT(llmcb_loop_post((llmcb_loop *)arg, say_post, (void *)"second"),
              LLMCB_OK);
}

/* What a post posts belongs to the next turn: else two that post each other
 * would hold the loop for ever. */
TEST(posts_of_posts_run_in_the_next_turn)
{
    llmcb_loop *loop = virtual_loop();

    script[0] = '\0';
    llmcb_loop_post(loop, post_again, loop);
    CHECK_STR(script, "");
    CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
    CHECK_STR(script, "first");
    CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
    CHECK_STR(script, "first second");
    llmcb_loop_free(loop);
}

static void *wake_thread(void *arg)
{
    until_waiting();
    llmcb_loop_wakeup((llmcb_loop *)arg);
    return NULL;
}

TEST(wakeup_ends_a_wait)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    pthread_t thread;
    int i;

    /* one that comes before the wait ends it too */
    llmcb_loop_wakeup(loop);
    CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
    for (i = 0; i < 20; i++) {
        REQUIRE(!pthread_create(&thread, NULL, wake_thread, loop));
        CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
        pthread_join(thread, NULL);
    }
    /* more than fit into a pipe: none blocks, all are taken at once */
    errno = 77;
    for (i = 0; i < 100000; i++) llmcb_loop_wakeup(loop);
    CHECK_INT(errno, 77);
    CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
    {
        struct pollfd fd[4];
        int64_t ms = 0;
        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        CHECK_INT(ms, -1);
        CHECK_INT(llmcb_loop_pollfds(loop, fd, 4), 1);
        CHECK_INT(poll(fd, 1, 0), 0);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* One byte a sleep, not one a post: a flood of posts stays cheap, and no
 * byte is left behind. */
TEST(posts_leave_no_wakeup_behind)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    struct pollfd fd[4];
    int64_t ms = 0;
    int i;

    script[0] = '\0';
    CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
    CHECK_INT(ms, -1);
    for (i = 0; i < 3; i++) llmcb_loop_post(loop, say_post, (void *)"x");
    CHECK_INT(llmcb_loop_pollfds(loop, fd, 4), 1);
    CHECK_INT(poll(fd, 1, 0), 1); /* the host that sleeps is woken */
    CHECK_INT(llmcb_loop_dispatch(loop, fd, 1), LLMCB_OK);
    CHECK_STR(script, "x x x");
    CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
    CHECK_INT(ms, -1);
    CHECK_INT(llmcb_loop_pollfds(loop, fd, 4), 1);
    CHECK_INT(poll(fd, 1, 0), 0);
    llmcb_loop_free(loop);
}

static llmcb_loop *volatile signal_loop;
static llmcb_op *volatile signal_op;

static void on_signal(int number)
{
    (void)number;
    llmcb_loop_wakeup(signal_loop);
    llmcb_op_cancel(signal_op);
}

static void *signal_thread(void *arg)
{
    until_waiting();
    pthread_kill(*(pthread_t *)arg, SIGUSR1);
    return NULL;
}

TEST(wakeup_and_cancel_in_a_signal_handler)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    struct sigaction act, before;
    pthread_t thread, self = pthread_self();
    sleeper s;

    memset(&act, 0, sizeof act);
    act.sa_handler = on_signal;
    act.sa_flags = SA_RESTART;
    REQUIRE(sigaction(SIGUSR1, &act, &before) == 0);
    signal_loop = loop;
    signal_op = NULL;
    raise(SIGUSR1); /* outside the wait */
    CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
    REQUIRE(!pthread_create(&thread, NULL, signal_thread, &self));
    CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
    pthread_join(thread, NULL);
    sleeper_set(&s, NULL, (int64_t)86400 * 1000);
    signal_op = llmcb_task_start(loop, sleeper_step, 0, &s);
    REQUIRE(!pthread_create(&thread, NULL, signal_thread, &self));
    CHECK_INT(llmcb_op_wait(signal_op), LLMCB_OK);
    CHECK_INT(s.result, LLMCB_ECANCELLED);
    pthread_join(thread, NULL);
    sigaction(SIGUSR1, &before, NULL);
    llmcb_op_free(signal_op);
    llmcb_loop_free(loop);
}

static void on_nothing(int number)
{
    (void)number;
}

/* A signal that is not ours neither ends the run nor is an error. */
static void *storm_thread(void *arg)
{
    void **args = (void **)arg;
    int i;

    for (i = 0; i < 50; i++) {
        until_waiting();
        pthread_kill(*(pthread_t *)args[0], SIGUSR1);
    }
    llmcb_loop_post((llmcb_loop *)args[1], say_post, (void *)"posted");
    llmcb_op_cancel((llmcb_op *)args[2]);
    return NULL;
}

TEST(signals_do_not_end_a_run)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    struct sigaction act, before;
    pthread_t thread, self = pthread_self();
    sleeper s;
    void *args[3];
    llmcb_op *op;

    memset(&act, 0, sizeof act);
    act.sa_handler = on_nothing;
    REQUIRE(sigaction(SIGUSR1, &act, &before) == 0);
    script[0] = '\0';
    sleeper_set(&s, NULL, (int64_t)86400 * 1000);
    op = llmcb_task_start(loop, sleeper_step, 0, &s);
    args[0] = &self;
    args[1] = loop;
    args[2] = op;
    REQUIRE(!pthread_create(&thread, NULL, storm_thread, args));
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK(llmcb_op_done(op));
    /* the cancel may have come a turn before the post */
    CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
    CHECK_STR(script, "posted");
    pthread_join(thread, NULL);
    sigaction(SIGUSR1, &before, NULL);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* ---- turns -------------------------------------------------------------- */

TEST(run_once_0_never_waits)
{
    int what;

    for (what = 0; what < 5; what++) {
        llmcb_loop *loop = llmcb_loop_new(NULL);
        gate g = GATE_INIT;
        int fds[2], i;
        reader r = { -1, LLMCB_READ, LLMCB_FOREVER, LLMCB_OK };
        sleeper s;
        llmcb_op *op = NULL;

        REQUIRE(pipe(fds) == 0);
        r.fd = fds[0];
        sleeper_set(&s, NULL, (int64_t)86400 * 1000);
        if (what == 1) op = llmcb_task_start(loop, sleeper_step, 0, &s);
        if (what == 2) op = llmcb_task_start(loop, reader_step, 0, &r);
        if (what == 3) op = llmcb_offload(loop, gated_job, &g);
        if (what == 4) llmcb_loop_post(loop, say_post, (void *)"");
        waits_reset();
        for (i = 0; i < 4; i++)
            CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
        CHECK_INT(waits, 4);
        CHECK_INT(longest, 0);
        gate_set(&g, 1);
        llmcb_op_free(op);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        close(fds[0]);
        close(fds[1]);
    }
}

TEST(run_once_waits_no_longer_than_it_may)
{
    static const struct {
        int64_t sleep, max;
        int longest;
    } rows[] = { { 0, 50, 50 },      { 1000, 50, 50 },
                 { 20, 50, 21 },     { 20, LLMCB_FOREVER, 21 },
                 { 20, INT64_MAX, 21 }, { 0, INT64_MAX, INT_MAX } };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmcb_loop *loop;
        llmcb_op *op = NULL;
        sleeper s;

        fake_begin(0, 0);
        loop = llmcb_loop_new(NULL);
        sleeper_set(&s, NULL, rows[i].sleep);
        if (rows[i].sleep) op = llmcb_task_start(loop, sleeper_step, 0, &s);
        llmcb_loop_run_once(loop, 0);
        waits_reset();
        CHECK_INT(llmcb_loop_run_once(loop, rows[i].max), LLMCB_OK);
        CHECK_INT(waits, 1);
        CHECK_INT(longest, rows[i].longest);
        llmcb_op_free(op);
        llmcb_loop_free(loop);
        fake_end();
    }
}

/* Nothing happens: nothing runs. A far timer costs its waits alone. */
TEST(an_idle_loop_makes_no_wakeups)
{
    static const struct {
        int64_t ms;
        int most;
    } rows[] = { { 1, 4 },
                 { 3600 * 1000, 4 },
                 { (int64_t)100 * 86400 * 1000, 8 } };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmcb_loop *loop;
        llmcb_op *op;
        sleeper s;

        fake_begin(500000, 1000);
        loop = llmcb_loop_new(NULL);
        sleeper_set(&s, NULL, rows[i].ms);
        waits_reset();
        op = llmcb_task_start(loop, sleeper_step, 0, &s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK(waits <= rows[i].most);
        CHECK(waits >= 2);
        llmcb_op_free(op);
        llmcb_loop_free(loop);
        fake_end();
    }
}

enum { BYTES = 50 };

static llmcb_step bytes_step(llmcb_task *t)
{
    int *fd = (int *)t->self, *n = (int *)t->frame;
    char byte;

    LLMCB_BEGIN(t);
    while (*n < BYTES) {
        LLMCB_AWAIT(t, llmcb_await_fd(t, *fd, LLMCB_READ, LLMCB_FOREVER));
        if (t->result != LLMCB_OK) return t->result;
        if (read(*fd, &byte, 1) != 1) return LLMCB_EIO;
        ++*n;
    }
    LLMCB_END(t);
}

static void *bytes_thread(void *arg)
{
    int i;

    for (i = 0; i < BYTES; i++) {
        until_waiting();
        if (write(*(int *)arg, "x", 1) != 1) break;
        /* not before the loop has come out of its wait */
        pthread_mutex_lock(&hook_mutex);
        while (waits < i + 3 && i + 1 < BYTES)
            pthread_cond_wait(&hook_cond, &hook_mutex);
        pthread_mutex_unlock(&hook_mutex);
    }
    return NULL;
}

TEST(one_wait_an_event)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    pthread_t thread;
    int fds[2];
    llmcb_op *op;

    REQUIRE(pipe(fds) == 0);
    waits_reset();
    op = llmcb_task_start(loop, bytes_step, sizeof(int), &fds[0]);
    REQUIRE(!pthread_create(&thread, NULL, bytes_thread, &fds[1]));
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    pthread_join(thread, NULL);
    CHECK(waits <= BYTES + 1);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
    close(fds[0]);
    close(fds[1]);
}

/* Hundreds of descriptors, of which some tick. */
enum { MANY = 256, ALONE = 40, FULL = 128 }; /* of one turn: all it serves */

typedef struct ticking {
    llmcb_loop *loop;
    llmcb_op *ops[MANY];
    int fds[MANY];
    int pipes[ALONE + 2][2]; /* one each, one for several, and a quiet one */
} ticking;

static llmcb_step tick_step(llmcb_task *t)
{
    int *fd = (int *)t->self;
    char byte;

    LLMCB_BEGIN(t);
    do {
        LLMCB_AWAIT(t, llmcb_await_fd(t, *fd, LLMCB_READ, LLMCB_FOREVER));
        if (t->result != LLMCB_OK) return t->result;
    } while (read(*fd, &byte, 1) == 1 || errno == EAGAIN);
    LLMCB_END(t);
}

static void ticking_begin(ticking *k)
{
    int i;

    fake_begin(0, 0);
    k->loop = llmcb_loop_new(NULL);
    for (i = 0; i < ALONE + 2; i++) REQUIRE(pipe(k->pipes[i]) == 0);
    /* a byte of several is there for all of them */
    fcntl(k->pipes[ALONE][0], F_SETFL, O_NONBLOCK);
    for (i = 0; i < MANY; i++) {
        int from = i < ALONE ? i : i < FULL ? ALONE : ALONE + 1;
        k->fds[i] = dup(k->pipes[from][0]);
        REQUIRE(k->fds[i] >= 0);
        k->ops[i] = llmcb_task_start(k->loop, tick_step, 0, &k->fds[i]);
    }
    llmcb_loop_run_once(k->loop, 0);
}

/* n descriptors come, and a turn serves them. How often it waited, if it took
 * as many ms; else -1. */
static int tick(ticking *k, int n, int64_t max_ms, int ms)
{
    int64_t before = fake_ns;
    int i;

    for (i = 0; i < n; i++)
        CHECK(write(k->pipes[i < ALONE ? i : ALONE][1], "x", 1) == 1);
    waits_reset();
    CHECK_INT(llmcb_loop_run_once(k->loop, max_ms), LLMCB_OK);
    return fake_ns - before == ms * (int64_t)1000000 ? waits : -1;
}

/* So many come in each of so many milliseconds. */
static void tick_on(ticking *k, int n, int turns)
{
    for (; turns > 0; turns--) {
        int64_t before = fake_ns;
        int i;
        tick(k, n, LLMCB_FOREVER, 0);
        if (fake_ns == before) fake_ns += 1000000; /* it has not rested */
        for (i = 0; i <= ALONE; i++) { /* all of it is read */
            struct pollfd left = { 0, POLLIN, 0 };
            left.fd = k->pipes[i][0];
            CHECK_INT(poll(&left, 1, 0), 0);
        }
    }
}

static void ticking_end(ticking *k)
{
    int i;

    for (i = 0; i < MANY; i++) {
        llmcb_op_free(k->ops[i]);
        close(k->fds[i]);
    }
    CHECK_INT(llmcb_loop_free(k->loop), LLMCB_OK);
    for (i = 0; i < ALONE + 2; i++) {
        close(k->pipes[i][0]);
        close(k->pipes[i][1]);
    }
    fake_end();
}

/* Where several come in a millisecond, the loop waits one for more before it
 * looks. */
TEST(a_loop_of_many_that_tick_rests)
{
    static ticking k;

    if (!LLMCBI_QUICK) SKIP("the loop of a small build never rests");
    ticking_begin(&k);
    tick_on(&k, 4, 99);
    CHECK_INT(tick(&k, 4, LLMCB_FOREVER, 0), 1); /* they are still counted */
    fake_ns += 2000000;
    tick(&k, 12, LLMCB_FOREVER, 0);
    CHECK_INT(tick(&k, 4, LLMCB_FOREVER, 1), 2);
    CHECK_INT(tick(&k, 4, 1, 1), 2);
    CHECK_INT(tick(&k, 4, 0, 0), 1); /* it may not wait */
    llmcb_loop_wakeup(k.loop);       /* a thread ends the rest */
    CHECK_INT(tick(&k, 4, LLMCB_FOREVER, 0), 2);
    interrupted = true; /* so does a signal, and the wait */
    CHECK_INT(tick(&k, 0, 10, 0), 2);
    CHECK(!interrupted);
    /* as many as it serves, one of them the wake-up: there may be more */
    llmcb_loop_wakeup(k.loop);
    CHECK_INT(tick(&k, FULL, LLMCB_FOREVER, 0), 2);
    CHECK_INT(tick(&k, 4, LLMCB_FOREVER, 0), 1);
    tick_on(&k, 4, 200); /* it goes on so */
    CHECK_INT(tick(&k, 4, LLMCB_FOREVER, 1), 2);
    CHECK_INT(tick(&k, 0, 9, 9), 2); /* no longer than it may */
    tick_on(&k, 3, 30);              /* until too few come */
    CHECK_INT(tick(&k, 3, LLMCB_FOREVER, 0), 1);
    ticking_end(&k);
}

/* How many of 40 turns rest in which n descriptors come, after 40 have come in
 * each millisecond without a rest, and `first` with one. */
static int rests_at(int first, int n)
{
    static ticking k;
    int i, rests = 0;

    ticking_begin(&k);
    tick_on(&k, 40, 101);
    tick_on(&k, first, 20);
    for (i = 0; i < 40; i++) rests += tick(&k, n, LLMCB_FOREVER, 1) == 2;
    ticking_end(&k);
    return rests;
}

/* Not where less comes for it: those ask again when they are answered. */
TEST(a_loop_of_many_that_wait_for_it_does_not_rest)
{
    if (!LLMCBI_QUICK) SKIP("the loop of a small build never rests");
    CHECK_INT(rests_at(40, 20), 40);
    CHECK(rests_at(40, 19) < 20);
    CHECK(rests_at(40, 4) < 20);
    CHECK(rests_at(25, 15) < 20); /* less by and by */
}

/* Nor where one less comes, or one descriptor less is watched. */
TEST(a_loop_of_fewer_does_not_rest)
{
    static ticking k;

    ticking_begin(&k);
    tick_on(&k, 3, 210);
    CHECK_INT(tick(&k, 3, LLMCB_FOREVER, 0), 1);
    ticking_end(&k);
    ticking_begin(&k);
    llmcb_op_cancel(k.ops[MANY - 1]);
    tick_on(&k, 40, 210);
    CHECK_INT(tick(&k, 40, LLMCB_FOREVER, 0), 1);
    ticking_end(&k);
}

static void stop_post(void *arg)
{
    llmcb_loop_stop((llmcb_loop *)arg);
    say("stop");
}

TEST(stop_ends_run_after_the_turn)
{
    llmcb_loop *loop = virtual_loop();
    sleeper s;
    llmcb_op *op;

    script[0] = '\0';
    sleeper_set(&s, "slept", 10);
    op = llmcb_task_start(loop, sleeper_step, 0, &s);
    llmcb_loop_post(loop, stop_post, loop);
    llmcb_loop_post(loop, say_post, (void *)"same turn");
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK_STR(script, "stop same turn");
    CHECK(llmcb_loop_alive(loop));
    llmcb_loop_post(loop, stop_post, loop);
    CHECK_INT(llmcb_loop_run_until(loop, op), LLMCB_EBUSY);
    CHECK(!llmcb_op_done(op));
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK_STR(script, "stop same turn stop slept");
    CHECK(!llmcb_loop_alive(loop));
    /* nothing under way: nothing to wait for */
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    CHECK_INT(llmcb_loop_run_until(loop, op), LLMCB_OK);
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

/* ---- where calls are not legal ------------------------------------------ */

static llmcb_op *other_op; /* under way, of the loop in question */

static void watch_nothing(void *user, int fd, int events)
{
    (void)user;
    (void)fd;
    (void)events;
}

static void timer_nothing(void *user, int64_t ms)
{
    (void)user;
    (void)ms;
}

/* All that turn or end the loop; how many did not say `want`. */
static int refused(llmcb_loop *loop, llmcb_code want, bool from_outside)
{
    static const char *const names[] = {
        "run", "run_once", "prepare", "dispatch", "fd_event", "timer_event",
        "set_host", "run_until", "op_wait", "clock_advance", "loop_free"
    };
    llmcb_host host = { watch_nothing, timer_nothing, NULL };
    llmcb_code codes[11];
    int64_t ms;
    int i, wrong = 0;

    codes[0] = llmcb_loop_run(loop);
    codes[1] = llmcb_loop_run_once(loop, 0);
    codes[2] = llmcb_loop_prepare(loop, &ms);
    codes[3] = llmcb_loop_dispatch(loop, NULL, 0);
    codes[4] = llmcb_loop_fd_event(loop, 0, LLMCB_READ);
    codes[5] = llmcb_loop_timer_event(loop);
    codes[6] = llmcb_loop_set_host(loop, &host);
    codes[7] = llmcb_loop_run_until(loop, other_op);
    codes[8] = llmcb_op_wait(other_op);
    /* inside a callback the clock may be moved */
    codes[9] = from_outside ? llmcb_clock_advance(loop, 1) : want;
    codes[10] = llmcb_loop_free(loop);
    for (i = 0; i < 11; i++)
        if (codes[i] != want) {
            printf("  %s said %d\n", names[i], codes[i]);
            wrong++;
        }
    return wrong;
}

static int refusals, refusals_wrong;

static void refused_post(void *arg)
{
    refusals++;
    refusals_wrong += refused((llmcb_loop *)arg, LLMCB_ESTATE, false);
}

static llmcb_step refused_step(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    refused_post(llmcb_task_loop(t));
    LLMCB_AWAIT(t, llmcb_sleep(t, 1));
    refused_post(llmcb_task_loop(t));
    LLMCB_END(t);
}

static int refused_job(void *arg)
{
    return -refused((llmcb_loop *)arg, LLMCB_ESTATE, true);
}

TEST(inside_callbacks_the_loop_is_not_run)
{
    llmcb_loop *loop = virtual_loop();
    llmcb_op *op, *job;
    sleeper s;

    refusals = refusals_wrong = 0;
    sleeper_set(&s, NULL, 1000);
    other_op = llmcb_task_start(loop, sleeper_step, 0, &s);
    llmcb_loop_post(loop, refused_post, loop);
    op = llmcb_task_start(loop, refused_step, 0, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(refusals, 3);
    CHECK_INT(refusals_wrong, 0);
    job = llmcb_offload(loop, refused_job, loop);
    CHECK_INT(llmcb_op_wait(job), LLMCB_OK);
    CHECK_INT(llmcb_op_wait(other_op), LLMCB_OK);
    llmcb_op_free(op);
    llmcb_op_free(job);
    llmcb_op_free(other_op);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

typedef struct strict_host {
    llmcb_loop *loop;
    int calls, wrong;
} strict_host;

static void strict_try(strict_host *h)
{
    if (!h->loop) return;
    h->calls++;
    if (llmcb_loop_run_once(h->loop, 0) != LLMCB_ESTATE) h->wrong++;
    if (llmcb_loop_timer_event(h->loop) != LLMCB_ESTATE) h->wrong++;
}

static void strict_watch(void *user, int fd, int events)
{
    (void)fd;
    (void)events;
    strict_try((strict_host *)user);
}

static void strict_timer(void *user, int64_t ms)
{
    strict_host *h = (strict_host *)user;
    llmcb_loop *loop = h->loop;

    (void)ms;
    h->loop = NULL; /* if it is not refused it comes back here */
    if (loop) {
        h->calls++;
        if (llmcb_loop_run_once(loop, 0) != LLMCB_ESTATE) h->wrong++;
        if (llmcb_loop_timer_event(loop) != LLMCB_ESTATE) h->wrong++;
    }
    h->loop = loop;
}

/* The hooks of a host are callbacks too. */
TEST(inside_host_hooks_the_loop_is_not_run)
{
    llmcb_loop *loop = virtual_loop();
    strict_host h = { NULL, 0, 0 };
    llmcb_host host = { strict_watch, strict_timer, NULL };
    llmcb_op *op;
    sleeper s;

    host.user = &h;
    CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
    h.loop = loop;
    sleeper_set(&s, NULL, 5);
    op = llmcb_task_start(loop, sleeper_step, 0, &s);
    CHECK(h.calls > 0);
    CHECK_INT(h.wrong, 0);
    h.loop = NULL;
    llmcb_op_free(op);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

static void *refused_thread(void *arg)
{
    refusals_wrong += refused((llmcb_loop *)arg, LLMCB_ESTATE, true);
    return NULL;
}

TEST(another_thread_is_refused)
{
    llmcb_loop *loop = virtual_loop();
    pthread_t thread;
    sleeper s;

    refusals_wrong = 0;
    sleeper_set(&s, NULL, 10);
    other_op = llmcb_task_start(loop, sleeper_step, 0, &s);
    CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
    REQUIRE(!pthread_create(&thread, NULL, refused_thread, loop));
    pthread_join(thread, NULL);
    CHECK_INT(refusals_wrong, 0);
    CHECK_INT(llmcb_op_wait(other_op), LLMCB_OK);
    llmcb_op_free(other_op);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* A loop made here and used there; two at once never meet. */
static void *whole_life(void *arg)
{
    llmcb_loop *loop = (llmcb_loop *)arg;
    intptr_t wrong = 0;
    sleeper s[20];
    llmcb_op *ops[20];
    int i;

    for (i = 0; i < 20; i++) {
        sleeper_set(&s[i], NULL, i);
        ops[i] = llmcb_task_start(loop, sleeper_step, 0, &s[i]);
    }
    for (i = 0; i < 20; i++) {
        llmcb_op *job = llmcb_offload(loop, quick_job, NULL);
        if (llmcb_op_wait(job) != LLMCB_OK) wrong++;
        if (llmcb_op_wait(ops[i]) != LLMCB_OK) wrong++;
        if (s[i].woke != i) wrong++;
        llmcb_op_free(job);
        llmcb_op_free(ops[i]);
    }
    if (llmcb_loop_free(loop) != LLMCB_OK) wrong++;
    return (void *)wrong;
}

TEST(loops_of_two_threads_never_meet)
{
    pthread_t threads[2];
    void *wrong;
    int i;

    for (i = 0; i < 2; i++)
        REQUIRE(!pthread_create(&threads[i], NULL, whole_life,
                                virtual_loop()));
    for (i = 0; i < 2; i++) {
        pthread_join(threads[i], &wrong);
        CHECK_INT((intptr_t)wrong, 0);
    }
}

/* ---- fork --------------------------------------------------------------- */

/* In the child; a bit for each thing that went wrong. */
static int fork_child(llmcb_loop *loop)
{
    int bits = 0, before = count_fds();

    alarm(20); /* its own, in case that it runs after all */
    if (llmcb_loop_run(loop) != LLMCB_EFORK) bits |= 1;
    if (llmcb_loop_run_once(loop, 0) != LLMCB_EFORK) bits |= 2;
    if (llmcb_op_wait(other_op) != LLMCB_EFORK) bits |= 4;
    if (llmcb_clock_advance(loop, 1) != LLMCB_EFORK) bits |= 8;
    if (llmcb_loop_prepare(loop, NULL) != LLMCB_EFORK ||
        llmcb_loop_dispatch(loop, NULL, 0) != LLMCB_EFORK ||
        llmcb_loop_fd_event(loop, 0, 1) != LLMCB_EFORK ||
        llmcb_loop_timer_event(loop) != LLMCB_EFORK ||
        llmcb_loop_set_host(loop, NULL) != LLMCB_EFORK)
        bits |= 16;
    if (llmcb_loop_post(loop, say_post, (void *)"child") != LLMCB_EFORK)
        bits |= 32;
    if (llmcb_loop_free(loop) != LLMCB_EFORK) bits |= 64;
    /* its own descriptors are closed: two of the wake-up, with epoll three */
    if (before >= 0 && before - count_fds() < 2) bits |= 128;
    return bits;
}

TEST(the_child_of_a_fork_may_only_free)
{
    llmcb_loop *loop = virtual_loop();
    llmcb_op *op, *job;
    reader r = { -1, LLMCB_READ, LLMCB_FOREVER, (llmcb_code)1 };
    sleeper s;
    int fds[2], status = 0;
    int64_t ms;
    pid_t pid;

    REQUIRE(pipe(fds) == 0);
    script[0] = '\0';
    r.fd = fds[0];
    sleeper_set(&s, "slept", 1000);
    other_op = llmcb_task_start(loop, sleeper_step, 0, &s);
    op = llmcb_task_start(loop, reader_step, 0, &r);
    job = llmcb_offload(loop, quick_job, NULL); /* a pool stands */
    CHECK_INT(llmcb_op_wait(job), LLMCB_OK);
    CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
    CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
    pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) test_exit(fork_child(loop));
    REQUIRE(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
    /* the parent has noticed nothing: no event, and its watch stands */
    CHECK(!llmcb_op_done(op));
    CHECK(write(fds[1], "x", 1) == 1);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(r.result, LLMCB_OK);
    CHECK_INT(llmcb_op_wait(other_op), LLMCB_OK);
    CHECK_STR(script, "slept");
    llmcb_op_free(op);
    llmcb_op_free(job);
    llmcb_op_free(other_op);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    close(fds[0]);
    close(fds[1]);
}

/* ---- the end of a loop -------------------------------------------------- */

TEST(free_cancels_all_and_leaves_nothing)
{
    counter c;
    llmcb_loop *loop;
    gate g = GATE_INIT;
    reader r = { -1, LLMCB_READ, 1000, (llmcb_code)1 };
    sleeper s[20];
    llmcb_op *ops[20];
    int fds[2], i, baseline = count_fds();

    counter_init(&c);
    loop = loop_with(&c, false, 2);
    REQUIRE(pipe(fds) == 0);
    script[0] = '\0';
    r.fd = fds[0];
    for (i = 0; i < 20; i++) {
        sleeper_set(&s[i], NULL, 100000 + i);
        ops[i] = llmcb_task_start(loop, sleeper_step, 0, &s[i]);
    }
    llmcb_task_start(loop, reader_step, 0, &r);
    llmcb_loop_run_once(loop, 0);
    llmcb_op_free(ops[3]); /* one that was given up already */
    llmcb_offload(loop, gated_job, &g);
    llmcb_offload(loop, gated_job, &g);
    llmcb_offload(loop, gated_job, &g);
    llmcb_loop_post(loop, say_post, (void *)"posted");
    gate_set(&g, 1);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    for (i = 0; i < 20; i++) CHECK_INT(s[i].result, LLMCB_ECANCELLED);
    CHECK_INT(r.result, LLMCB_ECANCELLED);
    CHECK_STR(script, "posted");
    close(fds[0]);
    close(fds[1]);
    CHECK_INT(c.live, 0);
    CHECK(!c.wrong_size);
    CHECK_INT(count_fds(), baseline);
}

static int late_posts;
static bool late_refused;

static void post_late(void *arg)
{
    late_posts++;
    if (late_posts < 2 &&
        llmcb_loop_post((llmcb_loop *)arg, post_late, arg) != LLMCB_OK)
        late_refused = true;
}

/* Also one that another posts meanwhile: it runs, or is refused. */
TEST(free_runs_or_refuses_posts_of_posts)
{
    counter c;
    llmcb_loop *loop;

    counter_init(&c);
    loop = loop_with(&c, true, 0);
    late_posts = 0;
    late_refused = false;
    CHECK_INT(llmcb_loop_post(loop, post_late, loop), LLMCB_OK);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK(late_posts == 2 || (late_posts == 1 && late_refused));
    CHECK_INT(c.live, 0);
}

static llmcb_step starter_step(llmcb_task *t)
{
    llmcb_loop *loop = llmcb_task_loop(t);

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000));
    /* nothing new begins while the loop is freed */
    if (t->result == LLMCB_ECANCELLED &&
        !llmcb_task_start(loop, sleeper_step, 0, NULL) &&
        !llmcb_offload(loop, quick_job, NULL))
        say("refused");
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000));
    if (t->result == LLMCB_ECANCELLED) say("cleaned");
    LLMCB_END(t);
}

TEST(free_lets_coroutines_clean_up)
{
    llmcb_loop *loop = virtual_loop();

    script[0] = '\0';
    llmcb_task_start(loop, starter_step, 0, NULL);
    llmcb_loop_run_once(loop, 0);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_STR(script, "refused cleaned");
}

static llmcb_step stubborn_step(llmcb_task *t)
{
    int *steps = (int *)t->self;

    ++*steps;
    return llmcb_sleep(t, 1);
}

/* A coroutine that will not end does not hold the program for ever. The
 * clock is our own: each look at it takes 10 ms. */
TEST(free_gives_up_a_coroutine_that_will_not_end)
{
    llmcb_loop_desc desc;
    counter c;
    llmcb_loop *loop;
    int steps = 0;

    counter_init(&c);
    memset(&desc, 0, sizeof desc);
    desc.allocator.resize = counter_resize;
    desc.allocator.user = &c;
    desc.shutdown_ms = 300;
    fake_begin(0, 10 * 1000000);
    loop = llmcb_loop_new(&desc);
    llmcb_task_start(loop, stubborn_step, 0, &steps);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_ETIMEDOUT);
    fake_end();
    CHECK(steps > 2);
    CHECK_INT(c.live, 0);
}

TEST(descriptors_are_not_inherited_and_closed)
{
    enum { MAX = 256 };
    bool before[MAX] = { false }, after[MAX] = { false };
    int n = list_fds(before, MAX), i, opened = 0;
    llmcb_loop *loop;

    if (n < 0) SKIP("no /proc/self/fd");
    loop = llmcb_loop_new(NULL);
    list_fds(after, MAX);
    for (i = 0; i < MAX; i++) {
        if (!after[i] || before[i]) continue;
        opened++;
        CHECK(fcntl(i, F_GETFD) & FD_CLOEXEC);
        /* a loop's own descriptors never block */
        if (opened <= 2) CHECK(fcntl(i, F_GETFL) & O_NONBLOCK);
    }
    CHECK(opened >= 2 && opened <= 3);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(count_fds(), n);
}

/* ---- arguments ---------------------------------------------------------- */

TEST(null_arguments)
{
    llmcb_loop *loop = virtual_loop();
    llmcb_host half;
    int64_t ms = 5;
    struct pollfd fd[4];

    CHECK_INT(llmcb_loop_free(NULL), LLMCB_OK);
    CHECK_INT(llmcb_loop_run(NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_run_until(NULL, NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_run_until(loop, NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_run_once(NULL, 0), LLMCB_ENOMEM);
    llmcb_loop_stop(NULL);
    CHECK(!llmcb_loop_alive(NULL));
    CHECK_INT(llmcb_loop_now(NULL), 0);
    CHECK_INT(llmcb_clock_advance(NULL, 1), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_post(NULL, say_post, NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_post(loop, NULL, NULL), LLMCB_EINVAL);
    llmcb_loop_wakeup(NULL);
    CHECK_INT(llmcb_loop_prepare(NULL, &ms), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_prepare(NULL, NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_prepare(loop, NULL), LLMCB_OK);
    CHECK_INT(llmcb_loop_pollfds(NULL, fd, 4), 0);
    CHECK_INT(llmcb_loop_pollfds(NULL, NULL, 0), 0);
    CHECK_INT(llmcb_loop_pollfds(loop, NULL, 4), 1);
    CHECK_INT(llmcb_loop_pollfds(loop, NULL, 0), 1);
    CHECK_INT(llmcb_loop_dispatch(NULL, fd, 1), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_dispatch(loop, NULL, 4), LLMCB_OK);
    CHECK_INT(llmcb_loop_set_host(NULL, NULL), LLMCB_ENOMEM);
    memset(&half, 0, sizeof half);
    CHECK_INT(llmcb_loop_set_host(loop, &half), LLMCB_EINVAL);
    half.watch = watch_nothing;
    CHECK_INT(llmcb_loop_set_host(loop, &half), LLMCB_EINVAL);
    half.watch = NULL;
    half.timer = timer_nothing;
    CHECK_INT(llmcb_loop_set_host(loop, &half), LLMCB_EINVAL);
    CHECK_INT(llmcb_loop_set_host(loop, NULL), LLMCB_OK);
    CHECK_INT(llmcb_loop_fd_event(NULL, 0, 1), LLMCB_ENOMEM);
    CHECK_INT(llmcb_loop_fd_event(loop, -1, 1), LLMCB_OK);
    CHECK_INT(llmcb_loop_timer_event(NULL), LLMCB_ENOMEM);
    CHECK_INT(llmcb_op_wait(NULL), LLMCB_ENOMEM);
    CHECK(llmcb_task_start(NULL, sleeper_step, 0, NULL) == NULL);
    CHECK(llmcb_task_start(loop, NULL, 0, NULL) == NULL);
    CHECK(llmcb_offload(NULL, quick_job, NULL) == NULL);
    CHECK(llmcb_offload(loop, NULL, NULL) == NULL);
    CHECK(!llmcb_loop_alive(loop));
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* ---- embedding ---------------------------------------------------------- */

/* The wait of a host, on the same clock as the loop. */
static void host_poll(struct pollfd *fds, size_t n, int64_t ms)
{
    int got = poll(fds, (nfds_t)n, ms < 0 ? -1 : 0);

    if (got == 0 && ms > 0) fake_ns += ms * 1000000;
}

/* The timeout must be 0 whenever there is something to do. */
TEST(prepare_says_0_when_something_is_ready)
{
    int what;

    for (what = 0; what < 9; what++) {
        llmcb_loop *loop;
        llmcb_op *op = NULL, *more = NULL;
        struct pollfd fd[4];
        int64_t ms = 77;
        sleeper s;
        size_t n;

        fake_begin(0, 0);
        loop = llmcb_loop_new(NULL);
        sleeper_set(&s, NULL, 100);
        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        CHECK_INT(ms, -1);
        op = llmcb_task_start(loop, sleeper_step, 0, &s);
        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        CHECK_INT(ms, 0);
        n = llmcb_loop_pollfds(loop, fd, 4);
        host_poll(fd, n, 0);
        CHECK_INT(llmcb_loop_dispatch(loop, fd, n), LLMCB_OK);
        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        CHECK_INT(ms, 101);
        switch (what) {
        case 0: llmcb_loop_post(loop, say_post, (void *)""); break;
        case 1: llmcb_op_cancel(op); break;
        case 2:
            llmcb_op_free(op);
            op = NULL;
            break;
        case 3: fake_ns += 101 * 1000000; break;
        case 4: fake_ns += (int64_t)5000 * 1000000; break;
        case 5: more = llmcb_task_start(loop, sleeper_step, 0, &s); break;
        case 6: /* a job whose end the loop has not been told of */
            fake_end(); /* the pool is real */
            more = llmcb_offload(loop, quick_job, NULL);
            CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
            llmcb_loop_pollfds(loop, fd, 4);
            if (ms != 0) CHECK_INT(poll(fd, 1, -1), 1);
            break;
        case 7: /* more rounds than one turn has */
            spins = 100;
            more = llmcb_task_start(loop, spin_step, 0, NULL);
            llmcb_loop_dispatch(loop, NULL, 0);
            break;
        case 8: /* from inside */
            script[0] = '\0';
            llmcb_loop_post(loop, post_again, loop);
            llmcb_loop_dispatch(loop, NULL, 0);
            CHECK_STR(script, "first");
            break;
        default: break;
        }
        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        if (ms != 0) TEST_FAIL("case %d: %lld", what, (long long)ms);
        fake_end();
        llmcb_op_free(op);
        llmcb_op_free(more);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
}

/* The recipe casts the timeout to int for poll(2). */
TEST(prepare_says_what_poll_can_take)
{
    static const int64_t sleeps[] = { INT_MAX, (int64_t)INT_MAX + 7,
                                      (int64_t)1 << 32, INT64_MAX };
    size_t i;

    for (i = 0; i < 4; i++) {
        llmcb_loop *loop = llmcb_loop_new(NULL);
        int64_t ms = 0;
        sleeper s;
        llmcb_op *op;

        sleeper_set(&s, NULL, sleeps[i]);
        op = llmcb_task_start(loop, sleeper_step, 0, &s);
        llmcb_loop_dispatch(loop, NULL, 0);
        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        CHECK(ms > INT_MAX - 60000 && ms <= INT_MAX);
        llmcb_op_free(op);
        llmcb_loop_free(loop);
    }
}

static llmcb_step both_step(llmcb_task *t)
{
    int *fds = (int *)t->self;
    char byte;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_fd(t, fds[0], LLMCB_READ, LLMCB_FOREVER));
    if (t->result != LLMCB_OK || read(fds[0], &byte, 1) != 1)
        return LLMCB_EIO;
    if (write(fds[1], "y", 1) != 1) return LLMCB_EIO;
    LLMCB_END(t);
}

/* The host polls a descriptor of its own in front of the loop's, and hands
 * all of them to dispatch. */
TEST(pull_embedding_beside_a_descriptor_of_the_host)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    int to_loop[2], to_host[2], pair[2], idle[2], i;
    reader other = { -1, LLMCB_READ, LLMCB_FOREVER, (llmcb_code)1 };
    bool heard = false;
    llmcb_op *op, *waits_on;
    char byte;

    REQUIRE(pipe(to_loop) == 0 && pipe(to_host) == 0 && pipe(idle) == 0);
    pair[0] = to_loop[0];
    pair[1] = to_host[1];
    other.fd = idle[0];
    waits_on = llmcb_task_start(loop, reader_step, 0, &other);
    op = llmcb_task_start(loop, both_step, 0, pair);
    for (i = 0; i < 20 && !heard; i++) {
        struct pollfd fds[8];
        int64_t ms = 0;
        size_t n;

        CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
        fds[0].fd = to_host[0];
        fds[0].events = POLLIN;
        n = llmcb_loop_pollfds(loop, fds + 1, 7);
        REQUIRE(n >= 1 && n <= 7);
        if (i == 3) CHECK(write(to_loop[1], "x", 1) == 1);
        if (i < 3 && ms) ms = 0; /* nothing comes yet */
        CHECK(poll(fds, (nfds_t)(n + 1), (int)ms) >= 0);
        if (fds[0].revents) {
            CHECK(read(to_host[0], &byte, 1) == 1 && byte == 'y');
            heard = true;
        }
        CHECK_INT(llmcb_loop_dispatch(loop, fds, n + 1), LLMCB_OK);
    }
    CHECK(heard);
    CHECK(llmcb_op_done(op));
    CHECK_INT(llmcb_op_code(op), LLMCB_OK);
    CHECK(!llmcb_op_done(waits_on));
    llmcb_op_free(op);
    llmcb_op_free(waits_on);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    for (i = 0; i < 2; i++) {
        close(to_loop[i]);
        close(to_host[i]);
        close(idle[i]);
    }
}

/* More descriptors than one turn serves, all ready: none is starved. */
TEST(many_descriptors)
{
    enum { N = 200 };
    static reader r[N];
    static llmcb_op *ops[N];
    static int fds[N][2];
    llmcb_loop *loop = llmcb_loop_new(NULL);
    int i, n, done = 0;

    for (n = 0; n < N && pipe(fds[n]) == 0; n++) {
        r[n].fd = fds[n][0];
        r[n].events = LLMCB_READ;
        r[n].ms = LLMCB_FOREVER;
        r[n].result = (llmcb_code)1;
        ops[n] = llmcb_task_start(loop, reader_step, 0, &r[n]);
    }
    llmcb_loop_run_once(loop, 0);
    for (i = 0; i < n; i++) CHECK(write(fds[i][1], "x", 1) == 1);
    for (i = 0; i < n; i++) CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
    for (i = 0; i < n; i++) {
        done += r[i].result == LLMCB_OK;
        llmcb_op_free(ops[i]);
        close(fds[i][0]);
        close(fds[i][1]);
    }
    CHECK_INT(done, N);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* A host for push embedding: a set of descriptors and one timer. */
typedef struct push_host {
    struct pollfd fds[32];
    size_t n;
    int64_t due; /* ns of the fake clock; -1: none */
    int timers, drops;
    int64_t last_ms;
} push_host;

static void push_watch(void *user, int fd, int events)
{
    push_host *h = (push_host *)user;
    size_t i;

    for (i = 0; i < h->n && h->fds[i].fd != fd; i++) continue;
    if (!events) {
        if (i == h->n) h->drops++; /* forgets what it was not told of */
        else h->fds[i] = h->fds[--h->n];
        return;
    }
    if (i == h->n) h->n++;
    h->fds[i].fd = fd;
    h->fds[i].events = (short)((events & LLMCB_READ ? POLLIN : 0) |
                               (events & LLMCB_WRITE ? POLLOUT : 0));
}

static void push_timer(void *user, int64_t ms)
{
    push_host *h = (push_host *)user;

    h->timers++;
    h->last_ms = ms;
    h->due = ms < 0 ? -1 : fake_ns + ms * 1000000;
}

/* A timer of a host goes off once. */
static void push_fire(push_host *h, llmcb_loop *loop)
{
    h->last_ms = h->due = -1;
    CHECK_INT(llmcb_loop_timer_event(loop), LLMCB_OK);
}

static void push_init(push_host *h, llmcb_host *host)
{
    memset(h, 0, sizeof *h);
    h->due = -1;
    host->watch = push_watch;
    host->timer = push_timer;
    host->user = h;
}

static void forget_watch(void *user, int fd, int events)
{
    (void)user;
    (void)fd;
    (void)events;
}

/* Reads so many bytes, one at a time. */
typedef struct nibbler {
    int fd, bytes, woken; /* how often */
    int64_t ms;
    llmcb_code result;
} nibbler;

static llmcb_step nibbler_step(llmcb_task *t)
{
    nibbler *n = (nibbler *)t->self;
    char byte;

    LLMCB_BEGIN(t);
    while (n->bytes) {
        LLMCB_AWAIT(t, llmcb_await_fd(t, n->fd, LLMCB_READ, n->ms));
        n->woken++;
        n->result = t->result;
        if (n->result != LLMCB_OK) return n->result;
        if (read(n->fd, &byte, 1) == 1) n->bytes--;
    }
    LLMCB_END(t);
}

enum { RUN, PULL, PUSH, TIMER_FIRST, VIRTUAL, N_WAYS, CROWD = 300 };

/* n descriptors, `bytes` bytes in each, and a turn after the deadline. */
static void late_turn(int way, int n, bool woken, int bytes)
{
    static nibbler r[CROWD];
    static llmcb_op *ops[CROWD];
    static int fds[CROWD][2];
    static struct pollfd set[CROWD + 1];
    int i, k, bad = 0;
    llmcb_loop *loop;
    push_host h;
    llmcb_host host;

    fake_begin(0, 0);
    loop = loop_with(NULL, way == VIRTUAL, 2);
    host.watch = forget_watch;
    host.timer = push_timer;
    host.user = &h;
    memset(&h, 0, sizeof h);
    if (way == PUSH || way == TIMER_FIRST)
        CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
    for (i = 0; i < n; i++) {
        REQUIRE(pipe(fds[i]) == 0);
        r[i].fd = fds[i][0];
        r[i].bytes = bytes;
        r[i].ms = 200;
        r[i].result = (llmcb_code)1;
        ops[i] = llmcb_task_start(loop, nibbler_step, 0, &r[i]);
    }
    llmcb_loop_run_once(loop, 0);
    if (woken) llmcb_loop_wakeup(loop); /* the first that epoll finds */
    for (i = 0; i < n; i++)
        CHECK(write(fds[i][1], "abcde", (size_t)bytes) == bytes);
    fake_ns += (int64_t)400 * 1000000;
    if (way == VIRTUAL) llmcb_clock_advance(loop, 400);
    for (k = 0; k < 20 * bytes && llmcb_loop_alive(loop); k++) {
        int64_t ms = 0;
        size_t all;
        switch (way) {
        case PULL:
            CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
            all = llmcb_loop_pollfds(loop, set, CROWD + 1);
            poll(set, (nfds_t)all, 0);
            CHECK_INT(llmcb_loop_dispatch(loop, set, all), LLMCB_OK);
            break;
        case TIMER_FIRST:
        case PUSH:
            if (way == TIMER_FIRST) push_fire(&h, loop);
            for (i = 0; i < n; i++)
                llmcb_loop_fd_event(loop, fds[i][0], LLMCB_READ);
            break;
        default: llmcb_loop_run_once(loop, 0);
        }
    }
    CHECK(!llmcb_loop_alive(loop));
    for (i = 0; i < n; i++) {
        bad += r[i].result != LLMCB_OK;
        llmcb_op_free(ops[i]);
        close(fds[i][0]);
        close(fds[i][1]);
    }
    if (bad)
        TEST_FAIL("way %d: %d of %d are late (woken: %d, bytes: %d)", way, bad,
                  n, woken, bytes);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    fake_end();
}

static const int late_counts[] = { 1, 3, 127, 128, 129, CROWD };
#define N_COUNTS (sizeof late_counts / sizeof *late_counts)

/* The loop was not turned until after the deadline, but before it there was
 * something to read: that is not late. However the loop is driven, also by a
 * host that comes with its timer before the descriptors, or with one of them
 * before the others; and with more than one turn tells. */
TEST(what_is_ready_comes_before_its_timer)
{
    size_t c;
    int way;

    for (way = 0; way < N_WAYS; way++)
        for (c = 0; c < N_COUNTS; c++)
            late_turn(way, late_counts[c], false, 1);
}

/* ... also where a wake-up takes a place among what one turn finds. */
TEST(what_is_ready_comes_before_its_timer_beside_a_wakeup)
{
    size_t c;
    int way;

    for (way = 0; way < N_WAYS; way++)
        for (c = 0; c < N_COUNTS; c++)
            late_turn(way, late_counts[c], true, 1);
}

/* ... and where what was told stays ready, so that the next turn finds it
 * again beside what it has not told yet. */
TEST(what_is_ready_comes_before_its_timer_and_stays_ready)
{
    size_t c;
    int way;

    for (way = 0; way < N_WAYS; way++)
        for (c = 0; c < N_COUNTS; c++) {
            late_turn(way, late_counts[c], false, 5);
            late_turn(way, late_counts[c], true, 5);
        }
}

/* A cancel comes before what is ready, whose descriptor may be gone. */
TEST(cancelled_when_it_was_ready)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    reader r = { -1, LLMCB_READ, LLMCB_FOREVER, LLMCB_OK };
    llmcb_op *op;
    int fds[2];

    REQUIRE(pipe(fds) == 0);
    r.fd = fds[0];
    op = llmcb_task_start(loop, reader_step, 0, &r);
    llmcb_loop_run_once(loop, 0);
    CHECK(write(fds[1], "x", 1) == 1);
    llmcb_op_cancel(op);
    llmcb_loop_run(loop);
    CHECK_INT(r.result, LLMCB_ECANCELLED);
    llmcb_op_free(op);
    close(fds[0]);
    close(fds[1]);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* One round of the host: what came, or else the timer. */
static void push_round(push_host *h, llmcb_loop *loop)
{
    struct pollfd fds[32];
    size_t i, n = h->n;
    int64_t ms = -1;
    bool came = false;

    if (h->due >= 0) ms = h->due <= fake_ns ? 0 : (h->due - fake_ns) / 1000000;
    memcpy(fds, h->fds, sizeof fds);
    host_poll(fds, n, ms);
    for (i = 0; i < n; i++) {
        int events = 0;
        if (fds[i].revents & (POLLIN | POLLERR | POLLHUP))
            events |= LLMCB_READ;
        if (fds[i].revents & (POLLOUT | POLLERR | POLLHUP))
            events |= LLMCB_WRITE;
        if (!events) continue;
        came = true;
        CHECK_INT(llmcb_loop_fd_event(loop, fds[i].fd, events), LLMCB_OK);
    }
    if (!came && h->due >= 0 && h->due <= fake_ns) push_fire(h, loop);
}

/* A byte that comes back: its descriptor is ready in every round. */
static llmcb_step echo_step(llmcb_task *t)
{
    int *fds = (int *)t->self;
    char byte;

    LLMCB_BEGIN(t);
    for (;;) {
        LLMCB_AWAIT(t, llmcb_await_fd(t, fds[0], LLMCB_READ, LLMCB_FOREVER));
        if (t->result != LLMCB_OK) return t->result;
        CHECK(read(fds[0], &byte, 1) == 1);
        CHECK(write(fds[1], &byte, 1) == 1);
    }
    LLMCB_END(t);
}

/* A host that has something else to do in every round never comes with its
 * timer, as where one that was set anew in a round is not looked at in it:
 * who sleeps wakes all the same. */
TEST(push_embedding_whose_timer_never_has_its_turn)
{
    push_host h;
    llmcb_host host;
    sleeper s;
    llmcb_op *echo, *sleeps;
    llmcb_loop *loop;
    int fds[2], i;

    fake_begin(0, 0);
    push_init(&h, &host);
    loop = loop_with(NULL, false, 2);
    CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
    REQUIRE(pipe(fds) == 0);
    CHECK(write(fds[1], "x", 1) == 1);
    sleeper_set(&s, NULL, 50);
    echo = llmcb_task_start(loop, echo_step, 0, fds);
    sleeps = llmcb_task_start(loop, sleeper_step, 0, &s);
    push_fire(&h, loop); /* they have begun */
    for (i = 0; i < 100 && !llmcb_op_done(sleeps); i++) {
        fake_ns += 1000000;
        push_round(&h, loop);
    }
    CHECK(llmcb_op_done(sleeps));
    CHECK_INT(s.result, LLMCB_OK);
    CHECK(h.timers > 40); /* its wish was replaced all the time */
    CHECK_INT(llmcb_loop_set_host(loop, NULL), LLMCB_OK);
    llmcb_op_free(echo);
    llmcb_op_free(sleeps);
    fake_end();
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    close(fds[0]);
    close(fds[1]);
}

/* Comes with all that it watches, ready or not. */
static void push_all(push_host *h, llmcb_loop *loop)
{
    struct pollfd fds[32];
    size_t i, n = h->n;

    memcpy(fds, h->fds, sizeof fds);
    for (i = 0; i < n; i++)
        CHECK_INT(llmcb_loop_fd_event(loop, fds[i].fd, LLMCB_READ), LLMCB_OK);
}

/* What a host found ready may have been told in the turn of its timer, or of
 * another descriptor: nobody is woken for it again, who might block then. */
TEST(push_embedding_with_stale_news)
{
    push_host h;
    llmcb_host host;
    nibbler r[2];
    llmcb_op *ops[2];
    llmcb_loop *loop;
    int fds[2][2], i;

    push_init(&h, &host);
    loop = loop_with(NULL, true, 2);
    CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
    memset(r, 0, sizeof r);
    for (i = 0; i < 2; i++) {
        REQUIRE(pipe(fds[i]) == 0);
        /* so that one who is woken in vain is counted */
        CHECK_INT(fcntl(fds[i][0], F_SETFL, O_NONBLOCK), 0);
        r[i].fd = fds[i][0];
        r[i].bytes = 2;
        r[i].ms = LLMCB_FOREVER;
        ops[i] = llmcb_task_start(loop, nibbler_step, 0, &r[i]);
    }
    push_fire(&h, loop); /* they wait */
    for (i = 0; i < 2; i++) CHECK(write(fds[i][1], "x", 1) == 1);
    push_fire(&h, loop);
    for (i = 0; i < 2; i++) CHECK_INT(r[i].woken, 1);
    push_all(&h, loop);
    for (i = 0; i < 2; i++) {
        CHECK_INT(r[i].woken, 1);
        CHECK(write(fds[i][1], "y", 1) == 1);
    }
    push_all(&h, loop); /* the first tells of both */
    for (i = 0; i < 2; i++) {
        CHECK_INT(r[i].woken, 2);
        CHECK(llmcb_op_done(ops[i]));
        llmcb_op_free(ops[i]);
        close(fds[i][0]);
        close(fds[i][1]);
    }
    CHECK_INT(llmcb_loop_set_host(loop, NULL), LLMCB_OK);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* The scenario of the four modes: sleeps with a tie, a descriptor, a post, a
 * cancel, a job, and one coroutine that waits for others. */
typedef struct scene {
    llmcb_loop *loop;
    llmcb_op *a, *b, *d;
    llmcb_op *ab[2];
    int fds[2];
} scene;

static llmcb_step scene_a(llmcb_task *t)
{
    scene *s = (scene *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 30));
    say("a30");
    LLMCB_AWAIT(t, llmcb_sleep(t, 10));
    say("a40");
    llmcb_op_cancel(s->d);
    LLMCB_END(t);
}

static llmcb_step scene_b(llmcb_task *t)
{
    scene *s = (scene *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 20));
    say("b20");
    llmcb_loop_post(s->loop, say_post, (void *)"post");
    LLMCB_AWAIT(t, llmcb_sleep(t, 20));
    say("b40");
    if (write(s->fds[1], "x", 1) != 1) say("no pipe");
    LLMCB_AWAIT(t, llmcb_sleep(t, 0));
    say("b0");
    return LLMCB_EIO;
    LLMCB_END(t);
}

static llmcb_step scene_c(llmcb_task *t)
{
    scene *s = (scene *)t->self;
    char byte;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_all(t, s->ab, 2, LLMCB_FOREVER));
    say(llmcb_code_name(t->result));
    LLMCB_AWAIT(t, llmcb_await_fd(t, s->fds[0], LLMCB_READ, LLMCB_FOREVER));
    if (t->result == LLMCB_OK && read(s->fds[0], &byte, 1) == 1) say("read");
    LLMCB_AWAIT(t, llmcb_await_fd(t, s->fds[1], LLMCB_WRITE, LLMCB_FOREVER));
    say(t->result == LLMCB_OK ? "room" : "no room");
    LLMCB_AWAIT(t, llmcb_await_blocking(t, quick_job, NULL));
    say("job");
    LLMCB_AWAIT(t, llmcb_sleep(t, 500));
    say("c500");
    LLMCB_END(t);
}

static llmcb_step scene_d(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000));
    say(t->result == LLMCB_ECANCELLED ? "d cancelled" : "d");
    LLMCB_END(t);
}

enum { DRIVE_RUN, DRIVE_ONCE, DRIVE_PULL, DRIVE_PUSH, DRIVE_N };

static void drive(int how, llmcb_loop *loop, llmcb_op *last)
{
    push_host h;
    llmcb_host host;
    int i;

    switch (how) {
    case DRIVE_RUN: CHECK_INT(llmcb_loop_run(loop), LLMCB_OK); return;
    case DRIVE_ONCE:
        for (i = 0; i < 1000 && !llmcb_op_done(last); i++)
            CHECK_INT(llmcb_loop_run_once(loop, LLMCB_FOREVER), LLMCB_OK);
        return;
    case DRIVE_PULL:
        for (i = 0; i < 1000 && !llmcb_op_done(last); i++) {
            struct pollfd fds[16];
            int64_t ms = -1;
            size_t n;
            CHECK_INT(llmcb_loop_prepare(loop, &ms), LLMCB_OK);
            n = llmcb_loop_pollfds(loop, fds, 16);
            host_poll(fds, n, ms);
            CHECK_INT(llmcb_loop_dispatch(loop, fds, n), LLMCB_OK);
        }
        return;
    case DRIVE_PUSH:
    default:
        push_init(&h, &host);
        CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
        for (i = 0; i < 1000 && !llmcb_op_done(last); i++)
            push_round(&h, loop);
        CHECK_INT(llmcb_loop_set_host(loop, NULL), LLMCB_OK);
        CHECK_INT(h.n, 0); /* it has forgotten all */
        CHECK_INT(h.drops, 0);
        return;
    }
}

TEST(four_ways_to_drive_it_give_one_transcript)
{
    int how, clock_kind;

    for (how = 0; how < DRIVE_N; how++)
        for (clock_kind = 0; clock_kind < 2; clock_kind++) {
            counter c;
            scene s;
            llmcb_op *op;
            int baseline = count_fds();

            memset(&s, 0, sizeof s);
            counter_init(&c);
            fake_begin(0, 0);
            script[0] = '\0';
            s.loop = loop_with(&c, clock_kind == 1, 2);
            REQUIRE(pipe(s.fds) == 0);
            s.ab[0] = s.a = llmcb_task_start(s.loop, scene_a, 0, &s);
            s.ab[1] = s.b = llmcb_task_start(s.loop, scene_b, 0, &s);
            s.d = llmcb_task_start(s.loop, scene_d, 0, &s);
            op = llmcb_task_start(s.loop, scene_c, 0, &s);
            drive(how, s.loop, op);
            CHECK_STR(script, "b20 post a30 b40 a40 d cancelled b0 "
                              "LLMCB_EIO read room job c500");
            CHECK(!llmcb_loop_alive(s.loop));
            llmcb_op_free(s.a);
            llmcb_op_free(s.b);
            llmcb_op_free(s.d);
            llmcb_op_free(op);
            fake_end(); /* the workers that leave are real */
            CHECK_INT(llmcb_loop_free(s.loop), LLMCB_OK);
            close(s.fds[0]);
            close(s.fds[1]);
            CHECK_INT(c.live, 0);
            CHECK(!c.wrong_size);
            CHECK_INT(count_fds(), baseline);
        }
}

/* What the host is told from outside a turn: without it the host sleeps. */
TEST(push_embedding_is_told_of_every_change)
{
    push_host h;
    llmcb_host host;
    llmcb_loop *loop = virtual_loop();
    reader r = { -1, LLMCB_READ, LLMCB_FOREVER, LLMCB_OK };
    sleeper s;
    llmcb_op *op, *holds;
    int fds[2], i;

    REQUIRE(pipe(fds) == 0);
    r.fd = fds[0];
    push_init(&h, &host);
    CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
    CHECK_INT(h.n, 1); /* the wake-up or epoll's descriptor */
    CHECK_INT(h.last_ms, -1);
    sleeper_set(&s, NULL, 100);
    op = llmcb_task_start(loop, sleeper_step, 0, &s);
    CHECK_INT(h.last_ms, 0);
    holds = llmcb_task_start(loop, reader_step, 0, &r);
    push_fire(&h, loop);
    CHECK_INT(h.last_ms, -1); /* the descriptor holds the clock */
    /* moved by hand: it is due now */
    CHECK_INT(llmcb_clock_advance(loop, 100), LLMCB_OK);
    CHECK_INT(h.last_ms, 0);
    push_fire(&h, loop);
    CHECK(llmcb_op_done(op));
    CHECK_INT(h.last_ms, -1);
    /* a post wakes it through a descriptor */
    script[0] = '\0';
    llmcb_loop_post(loop, say_post, (void *)"posted");
    for (i = 0; i < 10 && !script[0]; i++) push_round(&h, loop);
    CHECK_STR(script, "posted");
    /* so does a cancel */
    llmcb_op_cancel(holds);
    for (i = 0; i < 10 && !llmcb_op_done(holds); i++) push_round(&h, loop);
    CHECK(llmcb_op_done(holds));
    llmcb_op_free(op);
    llmcb_op_free(holds);
    /* an operation given up is cancelled soon */
    sleeper_set(&s, NULL, 100);
    r.result = (llmcb_code)1;
    holds = llmcb_task_start(loop, reader_step, 0, &r);
    push_fire(&h, loop);
    CHECK_INT(h.last_ms, -1);
    llmcb_op_free(holds);
    CHECK_INT(h.last_ms, 0);
    push_fire(&h, loop);
    CHECK_INT(r.result, LLMCB_ECANCELLED);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(h.n, 0);
    close(fds[0]);
    close(fds[1]);
}

/* The program may run the loop itself in between: what was armed or has gone
 * off meanwhile changes what the host has to wait for. */
TEST(push_embedding_is_told_of_what_the_program_runs_itself)
{
    int how;

    for (how = 0; how < 4; how++) {
        push_host h;
        llmcb_host host;
        llmcb_loop *loop;
        llmcb_op *first, *later;
        sleeper s[2];
        int timers;

        fake_begin(0, 0);
        loop = llmcb_loop_new(NULL);
        push_init(&h, &host);
        CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
        sleeper_set(&s[0], NULL, 100);
        sleeper_set(&s[1], NULL, 1000);
        first = llmcb_task_start(loop, sleeper_step, 0, &s[0]);
        later = llmcb_task_start(loop, sleeper_step, 0, &s[1]);
        CHECK_INT(h.last_ms, 0);
        switch (how) {
        case 0: /* both are armed in here, for 101 and 1001 */
            CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
            CHECK_INT(h.last_ms, 101);
            push_round(&h, loop);
            CHECK(llmcb_op_done(first));
            break;
        case 1: CHECK_INT(llmcb_op_wait(first), LLMCB_OK); break;
        case 2: CHECK_INT(llmcb_loop_run_until(loop, first), LLMCB_OK); break;
        default:
            while (!llmcb_op_done(first))
                llmcb_loop_run_once(loop, LLMCB_FOREVER);
        }
        CHECK_INT(h.last_ms, 900); /* until the other, from now on */
        CHECK(!llmcb_op_done(later));
        timers = h.timers;
        push_round(&h, loop);
        CHECK(llmcb_op_done(later));
        CHECK_INT(h.last_ms, -1);
        /* run to its end there is nothing left for the host */
        llmcb_op_free(later);
        sleeper_set(&s[1], NULL, 50);
        later = llmcb_task_start(loop, sleeper_step, 0, &s[1]);
        CHECK_INT(h.last_ms, 0);
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        CHECK_INT(h.last_ms, -1);
        CHECK(h.timers > timers);
        llmcb_op_free(first);
        llmcb_op_free(later);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        fake_end();
    }
}

/* A host that is dismissed, or whose loop is freed, must not be left with a
 * timer that calls into a loop that is gone. */
TEST(push_embedding_ends_without_a_timer)
{
    int how;

    for (how = 0; how < 2; how++) {
        push_host h;
        llmcb_host host;
        llmcb_loop *loop;
        llmcb_op *op;
        sleeper s;

        fake_begin(0, 0);
        loop = llmcb_loop_new(NULL);
        push_init(&h, &host);
        CHECK_INT(llmcb_loop_set_host(loop, &host), LLMCB_OK);
        sleeper_set(&s, NULL, 1000);
        op = llmcb_task_start(loop, sleeper_step, 0, &s);
        push_fire(&h, loop);
        CHECK_INT(h.last_ms, 1001);
        if (how == 0) CHECK_INT(llmcb_loop_set_host(loop, NULL), LLMCB_OK);
        else CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(h.last_ms, -1);
        CHECK_INT(h.n, 0);
        if (how == 0) {
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK); /* goes on without */
            llmcb_op_free(op);
            CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        }
        fake_end();
    }
}

/* ---- faults ------------------------------------------------------------- */

/* Each system call of llmcb_loop_new fails in turn. */
TEST(loop_new_when_a_system_call_fails)
{
    static const int numbers[] = { EMFILE, ENFILE, ENOMEM, EINTR, EPERM };
    size_t k;
    int i, refusals_seen;

    for (k = 0; k < 5; k++) {
        refusals_seen = 0;
        for (i = 0;; i++) {
            counter c;
            llmcb_loop *loop;
            int before = count_fds();
            bool used;

            counter_init(&c);
            sys_left = i;
            sys_errno = numbers[k];
            loop = loop_with(&c, true, 0);
            used = sys_left < 0;
            sys_left = -1;
            if (loop) { /* it did without: then it works */
                sleeper s;
                llmcb_op *op;
                sleeper_set(&s, NULL, 5);
                op = llmcb_task_start(loop, sleeper_step, 0, &s);
                CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
                llmcb_op_free(op);
                CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
            } else {
                refusals_seen++;
            }
            CHECK_INT(c.live, 0);
            CHECK_INT(count_fds(), before);
            if (!used) break;
            REQUIRE(i < 100);
        }
        CHECK(refusals_seen >= 7); /* pipe and 6 times fcntl at least */
    }
}

static llmcb_step all_step(llmcb_task *t)
{
    llmcb_op **ops = (llmcb_op **)t->self;
    int *fds = (int *)t->frame;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_all(t, ops, 20, LLMCB_FOREVER));
    if (t->result != LLMCB_OK) return t->result;
    LLMCB_AWAIT(t, llmcb_await_any(t, ops, 1, 50));
    if (t->result != LLMCB_OK) return t->result;
    if (pipe(fds) != 0) return LLMCB_ESYS;
    LLMCB_AWAIT(t, llmcb_await_fd(t, fds[1], LLMCB_WRITE, LLMCB_FOREVER));
    close(fds[0]);
    close(fds[1]);
    if (t->result != LLMCB_OK) return t->result;
    LLMCB_AWAIT(t, llmcb_await_blocking(t, quick_job, NULL));
    return t->result;
    LLMCB_END(t);
}

/* Everything once, with what failed counted. */
static int fault_scene(counter *c)
{
    llmcb_loop *loop = loop_with(c, true, 2);
    llmcb_op *ops[20], *op;
    sleeper s[20];
    bool missing = false;
    llmcb_code code;
    int i, n = 0;

    if (!loop) return 1;
    for (i = 0; i < 20; i++) {
        sleeper_set(&s[i], NULL, 20 - i);
        ops[i] = llmcb_task_start(loop, sleeper_step, 0, &s[i]);
        if (!ops[i]) missing = true;
    }
    if (llmcb_loop_post(loop, say_post, (void *)"") == LLMCB_ENOMEM) n++;
    op = llmcb_task_start(loop, all_step, 2 * sizeof(int), ops);
    code = llmcb_op_wait(op);
    if (!op) CHECK_INT(code, LLMCB_ENOMEM);
    if (code != LLMCB_OK) {
        CHECK_INT(code, LLMCB_ENOMEM);
        n++;
    }
    if (missing) n++;
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    for (i = 0; i < 20; i++) {
        if (ops[i]) CHECK_INT(s[i].woke, 20 - i);
        llmcb_op_free(ops[i]);
    }
    llmcb_op_free(op);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    return n;
}

TEST(every_allocation_fails_once_or_from_then_on)
{
    int baseline = count_fds(), forever;

    for (forever = 0; forever < 2; forever++) {
        long i;
        for (i = 0;; i++) {
            counter c;
            int failed;

            counter_init(&c);
            c.fail_at = i;
            c.forever = forever != 0;
            script[0] = '\0';
            failed = fault_scene(&c);
            CHECK_INT(c.live, 0);
            CHECK(!c.wrong_size);
            CHECK_INT(count_fds(), baseline);
            if (!c.failed) {
                CHECK_INT(failed, 0);
                CHECK(i > 25);
                break;
            }
            CHECK(failed > 0); /* none is absorbed unsaid */
            REQUIRE(i < 500);
        }
    }
}

int main(int argc, char **argv)
{
    alarm(60); /* what hangs is killed */
    return test_main(argc, argv);
}
