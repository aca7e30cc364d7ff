/* build: -O2 -U_FORTIFY_SOURCE -fno-sanitize=all */
/* Walks through the interleavings of the library's threads.
 *
 * The loop, its workers and a thread that cancels are coroutines of one real
 * thread. Each stops before everything that others can see: taking the mutex,
 * waiting, writing and reading the wake-up pipe, polling, the cancel flags,
 * and in the middle of every sync handler. There the walker decides who goes
 * on, and comes back for each other decision: a depth-first search. It does
 * not start again from the beginning: all memory that they have is in one
 * place, so a state is copied away and back, and one that was there before
 * is not walked again, since what follows is the same (states are known by a
 * hash of 64 bits over heap, stacks and registers). A count is kept of the
 * schedules that a state stands for. A state that comes again on the same way
 * is busy waiting, and a failure.
 *
 * Left out, for reasons: between two such points a thread is not interrupted
 * (that nobody else looks there meanwhile is ThreadSanitizer's business, but
 * writes to what the mutex guards without holding it are found here); workers
 * that wait, or have not begun, are alike, so the first stands for all.
 *
 *     test_walk [NAME]        what the gate runs
 *     WALK=deep               calls with up to two handlers without a bound,
 *                             the rest with 1 to 3; WALK=full: no bounds
 *     WALK_PREEMPTIONS=n      switches away from a thread that could go on
 *     WALK_TELL=1             a line for each scene
 *     WALK_ONLY=TEXT          only scenes whose names contain it
 *     WALK_REPLAY=NAME:STEPS  one schedule, as printed by a failure
 *
 * No sanitizers: they do not like stacks that are copied. */
#if !defined(__linux__) || !defined(__GNUC__)
#include "test.h"
TEST(walk)
{
    SKIP("the coroutines of this test are for Linux");
}
int main(int argc, char **argv)
{
    return test_main(argc, argv);
}
#else

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static int walk_lock(pthread_mutex_t *m);
static int walk_unlock(pthread_mutex_t *m);
static int walk_cond_wait(pthread_cond_t *c, pthread_mutex_t *m);
static int walk_signal(pthread_cond_t *c);
static int walk_broadcast(pthread_cond_t *c);
static int walk_nap(const struct timespec *time, struct timespec *left);
static pthread_t walk_self(void);
static int walk_join(pthread_t t);
static int walk_pthread_create(pthread_t *t, const pthread_attr_t *a,
                               void *(*fn)(void *), void *arg);
static int walk_clock_gettime(clockid_t id, struct timespec *ts);
static int walk_open(const char *path, int flags);
static int walk_close(int fd);
static int walk_fcntl(int fd, int op, ...);
static int walk_pipe(int *fds);
static int walk_poll(struct pollfd *fds, nfds_t n, int timeout);
static ssize_t walk_read(int fd, void *buf, size_t len);
static ssize_t walk_write(int fd, const void *buf, size_t len);
static void walk_store(volatile unsigned char *p, unsigned char v);
static unsigned char walk_load(const volatile unsigned char *p);

#define pthread_mutex_lock walk_lock
#define pthread_mutex_unlock walk_unlock
#define pthread_mutex_init(m, a) ((void)(m), (void)(a), 0)
#define pthread_mutex_destroy(m) ((void)(m))
#define pthread_cond_init(c, a) ((void)(c), (void)(a), 0)
#define pthread_cond_destroy(c) ((void)(c))
#define pthread_cond_wait walk_cond_wait
#define pthread_cond_signal walk_signal
#define pthread_cond_broadcast walk_broadcast
#define nanosleep walk_nap
#define pthread_self walk_self
#define pthread_equal(a, b) ((a) == (b))
#define pthread_join(t, r) walk_join(t)
#define pthread_detach(t) walk_join(t)
#define pthread_attr_init(a) memset(a, 0, sizeof *(a))
#define pthread_attr_setstacksize(a, n) 0
#define pthread_attr_destroy(a) ((void)(a))
#define pthread_sigmask(how, set, old) ((void)(set), (void)(old))
#define __atomic_store_n(p, v, order) walk_store(p, v)
#define __atomic_load_n(p, order) walk_load(p)
#define LLMCBI_SYS(call) walk_##call
#define LLMCB_ASSERT(x) ((x) ? (void)0 : fail("assertion: " #x))
static void fail(const char *why);
/* Blocks of logs are freed where it matters, so that a stale pointer shows. */
static bool spares(void);
#define LLMCBI_SPARE (spares() ? LLMCBI_MAX_SPARE : 0u)

#define LLMCB_IMPLEMENTATION
#ifndef LLMCB_NO_CURL
#define LLMCB_NO_CURL
#endif
#define LLMCB_NO_SOCKETS
#define LLMCB_NO_EPOLL
#define LLMCB_NO_KIT
#define LLMCB_NO_STDIO
#ifndef WALK_HEADER
#define WALK_HEADER "../llmcb.h" /* or a broken copy: tests/walk_mutants.sh */
#endif
#include WALK_HEADER
#include "test.h"

/* ---- the world: all that a state consists of ----------------------------- */

#define THREADS 5 /* the loop's, up to 3 workers, one that cancels */
#define STACK (256 * 1024)
#define HEAP (192 * 1024)
#define FRAME 192 /* below its base, what the frame of pause_here may take */
#define SEATS 3
#define NO_BOUND 255u

typedef enum at {
    AT_NOTHING,
    AT_START,
    AT_POINT, /* may go on */
    AT_CHOICE,
    AT_LOCK,
    AT_COND,
    AT_RELOCK, /* signalled */
    AT_POLL,
    AT_JOIN,
    AT_END
} at;

typedef struct thread {
    jmp_buf go;
    char *low; /* the lowest byte of its stack that it needs */
    void *(*fn)(void *arg);
    void *arg;
    const char *where;
    at at;
    int timeout, target, n;
} thread;

/* What a handler has seen of one run. */
typedef struct seen {
    uint64_t seq, done, n;
    unsigned tokens;
    bool inside, started, finished, finishing;
} seen;

/* One handler of a table. */
typedef struct seat {
    llmcb_handler h; /* first */
    char kind;
    unsigned inside; /* over all runs */
    seen of[2];
} seat;

static struct world {
    thread th[THREADS];
    int n_threads, current, alt;
    int owner; /* of the mutex; -1: nobody */
    unsigned pipe;
    int64_t clock;
    uint64_t shared; /* what the mutex guards, when it was last given back */
    bool checked;    /* `shared` is known */
    const char *failed;
    bool over;
    /* the scene */
    seat seats[SEATS];
    llmcb_transport tr;
    llmcb_loop *loop;
    llmcb_chat *chat;
    llmcb_op *op[2];
    const llmcb_run *run[2];
    llmcb_exchange *x;
    unsigned fed, posted;
    bool paused, cancelled, cancel_over, must_cancel;
    bool raised, freed, told, let_go;
    /* the heap */
    size_t blocks, top;
    char heap[HEAP];
} w;

static char stacks[THREADS][STACK] __attribute__((aligned(64)));
static jmp_buf walker;

/* What is walked through. */
typedef struct plan {
    char name[40];
    char table[SEATS + 1];
    char scene;  /* C: a chat call, R: two runs */
    /* Who cancels: - nobody, L the loop, H a handler, T a thread; F frees the
     * operation, D the loop. After the second token the server falls silent
     * until t, a thread, cancels, or p, it posts a function that does. */
    char cancel;
    unsigned workers;
    bool virtual_clock;
    bool large;     /* tokens that fill a block of the log each */
    bool impatient; /* handler_ms, and time passes whenever it may */
} plan;
static plan now;
static bool replaying;

static bool spares(void)
{
    return !now.large;
}

/* Only a cancel ends it. */
static bool silent(void)
{
    return now.cancel == 't' || now.cancel == 'p';
}

static void say(const char *format, ...)
{
    va_list ap;

    if (!replaying) return;
    va_start(ap, format);
    printf("  %d ", w.current);
    vprintf(format, ap);
    printf("\n");
    va_end(ap);
}

/* ---- threads ------------------------------------------------------------- */

static __attribute__((noinline)) void pause_here(void)
{
    thread *t = &w.th[w.current];

    t->low = (char *)__builtin_frame_address(0) - FRAME;
    if (_setjmp(t->go) == 0) _longjmp(walker, 1);
}

static void stop_at(at what, const char *where)
{
    thread *t = &w.th[w.current];

    if (t->at == AT_START) { /* that it begins was a choice already */
        t->at = AT_NOTHING;
        return;
    }
    t->at = what;
    t->where = where;
    pause_here();
    w.th[w.current].at = AT_NOTHING;
    say("%s", where);
}

static void point(const char *where)
{
    stop_at(AT_POINT, where);
}

static int choose(int n, const char *what)
{
    w.th[w.current].n = n;
    stop_at(AT_CHOICE, what);
    return w.alt;
}

static void fail(const char *why)
{
    if (!w.failed) w.failed = why;
    if (replaying) printf("  %d FAILS: %s\n", w.current, why);
    pause_here();
}

#define MUST(cond, why)        \
    do {                       \
        if (!(cond)) fail(why); \
    } while (0)

/* Each stack as it is when its thread has stopped in entry: what else is in
 * registers there comes from the walker, and is no part of the state. */
static struct pristine {
    jmp_buf go;
    size_t size;
    char bytes[2048];
} pristine[THREADS];

static void entry(void)
{
    pause_here();
    say("begins");
    w.th[w.current].fn(w.th[w.current].arg);
    w.th[w.current].at = AT_END;
    pause_here();
    abort();
}

static void make_stacks(void)
{
    static ucontext_t fresh;
    static int i;

    for (i = 0; i < THREADS; i++) {
        struct pristine *p = &pristine[i];
        if (_setjmp(walker) == 0) {
            w.current = i;
            getcontext(&fresh);
            fresh.uc_stack.ss_sp = stacks[i];
            fresh.uc_stack.ss_size = STACK;
            fresh.uc_link = NULL;
            makecontext(&fresh, entry, 0);
            setcontext(&fresh);
        }
        p = &pristine[i];
        memcpy(p->go, w.th[i].go, sizeof p->go);
        p->size = (size_t)(stacks[i] + STACK - w.th[i].low);
        if (p->size > sizeof p->bytes) abort();
        memcpy(p->bytes, w.th[i].low, p->size);
    }
}

static int spawn(void *(*fn)(void *), void *arg)
{
    thread *t = &w.th[w.n_threads];

    if (w.n_threads == THREADS) abort();
    memset(t, 0, sizeof *t);
    t->fn = fn;
    t->arg = arg;
    t->at = AT_START;
    t->where = "starts";
    t->low = stacks[w.n_threads] + STACK - pristine[w.n_threads].size;
    memcpy(t->low, pristine[w.n_threads].bytes, pristine[w.n_threads].size);
    memcpy(t->go, pristine[w.n_threads].go, sizeof t->go);
    return w.n_threads++;
}

static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

/* What the mutex guards; nothing there yet counts as zeroes. */
static uint64_t guarded(void)
{
    const llmcb_loop *l = w.loop;
    const llmcbi_pool *p = l->pool;
    const llmcbi_strand *s;
    uint64_t h = mix(l->sleeping, l->closed), sum = 0;

    h = mix(h, (uint64_t)(uintptr_t)l->posts);
    h = mix(h, (uint64_t)(uintptr_t)l->finished);
    h = mix(h, (uint64_t)(uintptr_t)l->progress);
    h = mix(h, l->progress_due);
    if (!p) return mix(mix(mix(mix(h, 0), 0), 0), 0);
    h = mix(h, (uint64_t)p->n_idle << 32 | p->n_exited);
    h = mix(h, (uint64_t)p->n_strands << 32 | p->n_jobs << 1 | p->stop);
    h = mix(h, (uint64_t)(uintptr_t)p->jobs);
    h = mix(h, (uint64_t)(uintptr_t)p->strands);
    for (s = p->known; s; s = s->next_known)
        if (s->first || s->queued)
            sum += mix((uint64_t)(uintptr_t)s->first, s->queued);
    return h + sum;
}

static void took_mutex(void)
{
    w.owner = w.current;
    if (w.loop && w.checked)
        MUST(guarded() == w.shared, "shared state changed without the mutex");
}

static void gives_mutex(void)
{
    MUST(w.owner == w.current, "the mutex is not its own to unlock");
    w.checked = w.loop != NULL;
    if (w.checked) w.shared = guarded();
    w.owner = -1;
}

static int walk_lock(pthread_mutex_t *m)
{
    (void)m;
    MUST(w.owner != w.current, "locks the mutex twice");
    stop_at(AT_LOCK, "locks");
    took_mutex();
    return 0;
}

static int walk_unlock(pthread_mutex_t *m)
{
    (void)m;
    gives_mutex();
    return 0;
}

static int walk_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
{
    (void)c;
    (void)m;
    gives_mutex();
    stop_at(AT_COND, "waits, and locks again");
    took_mutex();
    return 0;
}

/* As long as the walker likes. */
static int walk_nap(const struct timespec *time, struct timespec *left)
{
    (void)time;
    (void)left;
    point("naps");
    return 0;
}

static int walk_signal(pthread_cond_t *c)
{
    int i;

    (void)c;
    if (w.owner != w.current) point("signals without the mutex");
    for (i = 0; i < w.n_threads; i++)
        if (w.th[i].at == AT_COND) {
            w.th[i].at = AT_RELOCK;
            return 0;
        }
    return 0;
}

static int walk_broadcast(pthread_cond_t *c)
{
    int i;

    (void)c;
    if (w.owner != w.current) point("broadcasts without the mutex");
    for (i = 0; i < w.n_threads; i++)
        if (w.th[i].at == AT_COND) w.th[i].at = AT_RELOCK;
    return 0;
}

static pthread_t walk_self(void)
{
    return (pthread_t)(w.current + 1);
}

static int walk_pthread_create(pthread_t *t, const pthread_attr_t *a,
                               void *(*fn)(void *), void *arg)
{
    (void)a;
    *t = (pthread_t)(spawn(fn, arg) + 1);
    return 0;
}

static int walk_join(pthread_t t)
{
    w.th[w.current].target = (int)t - 1;
    stop_at(AT_JOIN, "joins");
    return 0;
}

/* The loop alone looks at flags, but while others may cancel. */
static bool flags_shared(void)
{
    return now.cancel && strchr("THt", now.cancel) && !w.cancel_over;
}

static void walk_store(volatile unsigned char *p, unsigned char v)
{
    if (flags_shared()) point("sets a flag");
    *p = v;
}

static unsigned char walk_load(const volatile unsigned char *p)
{
    if (flags_shared()) point("reads a flag");
    return *p;
}

/* ---- the system ---------------------------------------------------------- */

#define LONG_WAIT 1000 /* ms: nothing but the end of a loop waits that long */

static int walk_clock_gettime(clockid_t id, struct timespec *ts)
{
    (void)id;
    ts->tv_sec = 1000 + w.clock / 1000;
    ts->tv_nsec = w.clock % 1000 * 1000000;
    return 0;
}

static int walk_open(const char *path, int flags)
{
    (void)path;
    (void)flags;
    errno = ENOENT;
    return -1;
}

static int walk_close(int fd)
{
    (void)fd;
    return 0;
}

static int walk_fcntl(int fd, int op, ...)
{
    (void)fd;
    (void)op;
    return 0;
}

static int walk_pipe(int *fds)
{
    fds[0] = 10;
    fds[1] = 11;
    return 0;
}

static int walk_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    (void)n;
    w.th[w.current].timeout = timeout;
    stop_at(AT_POLL, "polls");
    if (!w.pipe && timeout > 0) w.clock += timeout;
    fds->revents = w.pipe ? POLLIN : 0;
    return w.pipe != 0;
}

static ssize_t walk_read(int fd, void *buf, size_t len)
{
    ssize_t n;

    (void)fd;
    (void)buf;
    point("reads the pipe");
    n = w.pipe < len ? (ssize_t)w.pipe : (ssize_t)len;
    w.pipe -= (unsigned)n;
    if (n) return n;
    errno = EAGAIN;
    return -1;
}

static ssize_t walk_write(int fd, const void *buf, size_t len)
{
    (void)fd;
    (void)buf;
    /* with the mutex it is as if it had been written when that was taken:
     * who does not take it in between sees no difference */
    if (w.owner != w.current) point("writes the pipe");
    w.pipe += (unsigned)len;
    return (ssize_t)len;
}

/* First fit, so that the same blocks stand in the same places whatever came
 * before. What is freed is overwritten: using it shows. */
typedef struct block {
    uint32_t size, asked; /* with this; asked 0: free */
    uint64_t pad;
} block;

static void *heap_get(size_t size)
{
    uint32_t need = (uint32_t)((size + 15) & ~(size_t)15) + sizeof(block);
    size_t i = 0;
    block *b;

    for (; i < w.top; i += b->size) {
        b = (block *)(void *)(w.heap + i);
        if (b->asked) continue;
        while (i + b->size < w.top) { /* with free ones behind it */
            block *next = (block *)(void *)(w.heap + i + b->size);
            if (next->asked) break;
            b->size += next->size;
        }
        if (b->size < need) continue;
        if (b->size >= need + 2 * sizeof(block)) {
            block *rest = (block *)(void *)(w.heap + i + need);
            rest->size = b->size - need;
            rest->asked = 0;
            rest->pad = 0;
            b->size = need;
        }
        break;
    }
    b = (block *)(void *)(w.heap + i);
    if (i == w.top) {
        if (w.top + need > HEAP) abort();
        b->size = need;
        w.top += need;
    }
    b->asked = (uint32_t)size;
    b->pad = 0;
    memset(b + 1, 0xA5, b->size - sizeof *b);
    w.blocks++;
    return b + 1;
}

static void heap_put(void *ptr, size_t size)
{
    block *b = (block *)ptr - 1;
    size_t i, last = 0;

    MUST(b->asked == size, "freed with a wrong size, or twice");
    b->asked = 0;
    memset(ptr, 0xDD, b->size - sizeof *b);
    w.blocks--;
    for (i = 0; i < w.top; i += b->size) {
        b = (block *)(void *)(w.heap + i);
        if (b->asked) last = i + b->size;
    }
    w.top = last; /* what is behind the last is no part of the state */
}

static void *heap_resize(void *user, void *ptr, size_t old, size_t size)
{
    void *fresh = size ? heap_get(size) : NULL;

    (void)user;
    if (fresh && ptr) memcpy(fresh, ptr, old < size ? old : size);
    if (ptr) heap_put(ptr, old);
    return fresh;
}

/* ---- the walk ------------------------------------------------------------ */

typedef struct option {
    uint8_t thread, alt;
} option;

#define OPTIONS 8
typedef struct node {
    uint64_t key;
    size_t snapshot; /* where it is kept */
    double paths;
    option options[OPTIONS];
    uint8_t n, next, preemptions;
} node;

#define MAX_DEPTH 5000
static node nodes[MAX_DEPTH];
static size_t depth, deepest;
static char *copies;
static size_t copies_cap, copies_len;

typedef struct state {
    uint64_t key;
    double paths; /* -1: on the way */
} state;
static state *states;
static size_t states_cap, n_states, n_steps;
static unsigned max_preemptions = NO_BOUND;

static size_t live(int i)
{
    return (size_t)(stacks[i] + STACK - w.th[i].low);
}

static void save(node *n)
{
    size_t fixed = offsetof(struct world, heap) + w.top, need = fixed;
    char *to;
    int i;

    for (i = 0; i < w.n_threads; i++)
        need += live(i);
    n->snapshot = copies_len;
    if (copies_len + need > copies_cap) {
        copies_cap = 2 * (copies_len + need);
        copies = (char *)realloc(copies, copies_cap);
        if (!copies) abort();
    }
    to = copies + copies_len;
    memcpy(to, (char *)&w, fixed);
    to += fixed;
    for (i = 0; i < w.n_threads; i++) {
        memcpy(to, w.th[i].low, live(i));
        to += live(i);
    }
    copies_len += need;
}

static void restore(const node *n)
{
    const char *from = copies + n->snapshot;
    const size_t head = offsetof(struct world, heap);
    int i;

    memcpy((char *)&w, from, head);
    memcpy(w.heap, from + head, w.top);
    from += head + w.top;
    for (i = 0; i < w.n_threads; i++) {
        memcpy(w.th[i].low, from, live(i));
        from += live(i);
    }
}

static uint64_t hash_bytes(uint64_t h, const void *ptr, size_t len)
{
    const char *p = (const char *)ptr;
    uint64_t a = h, b = ~h, c = h * 3, d = h * 5, v[4];

    for (; len >= 32; len -= 32, p += 32) {
        memcpy(v, p, 32);
        a = (a ^ v[0]) * 0x9E3779B97F4A7C15u;
        b = (b ^ v[1]) * 0xC2B2AE3D27D4EB4Fu;
        c = (c ^ v[2]) * 0x165667B19E3779F9u;
        d = (d ^ v[3]) * 0xD6E8FEB86659FD93u;
        a ^= a >> 31;
        b ^= b >> 29;
        c ^= c >> 30;
        d ^= d >> 28;
    }
    memset(v, 0, sizeof v);
    memcpy(v, p, len);
    a = mix(mix(a, v[0]), v[1]);
    b = mix(mix(b, v[2]), v[3]);
    return mix(mix(mix(a, b), c), d);
}

/* A thread; which of the workers it is makes no difference, so pointers to
 * its own stack count from there. */
static uint64_t hash_thread(int i)
{
    const thread *t = &w.th[i];
    const uintptr_t base = (uintptr_t)stacks[i];
    uint64_t h = mix(t->at, (uint64_t)(uintptr_t)t->fn);
    uintptr_t v;
    size_t k, n = live(i);

    /* waiting is done in one place, where nothing local matters any more */
    if (t->at == AT_COND || t->at == AT_RELOCK || t->at == AT_END) return h;
    h = mix(h, (uint64_t)(uintptr_t)t->where);
    h = mix(h, (uint64_t)t->timeout << 32 | (uint64_t)t->target << 8 |
                   (uint64_t)t->n);
    for (k = 0; k < n; k += sizeof v) {
        memcpy(&v, t->low + k, sizeof v);
        h = mix(h, v - base < STACK ? v - base : v);
    }
#if defined(__x86_64__) && defined(__GLIBC__)
    /* rbx, r12 to r15; rbp, rsp and rip are coded, and follow from the stack */
    for (k = 0; k < 6; k++) {
        if (k == 1) continue;
        memcpy(&v, (const char *)&t->go + k * sizeof v, sizeof v);
        h = mix(h, v - base < STACK ? v - base : v);
    }
#else
    h = hash_bytes(h, t->go, sizeof t->go);
#endif
    return mix(h, n);
}

static uint64_t hash_state(unsigned preemptions)
{
    const size_t from = offsetof(struct world, owner);
    uint64_t h = (uint64_t)w.n_threads, workers = 0;
    int i;

    for (i = 0; i < w.n_threads; i++)
        if (w.th[i].fn == llmcbi_worker)
            workers += mix(hash_thread(i), max_preemptions != NO_BOUND &&
                                               w.current == i);
        else
            h = mix(h, hash_thread(i));
    if (max_preemptions != NO_BOUND) /* only the bound asks who ran last */
        h = mix(h, preemptions << 1 |
                       (w.th[w.current].fn == llmcbi_worker ? 1u : 0u));
    if (max_preemptions != NO_BOUND && w.th[w.current].fn != llmcbi_worker)
        h = mix(h, (uint64_t)w.current);
    h = hash_bytes(mix(h, workers), (const char *)&w + from,
                   offsetof(struct world, heap) - from + w.top);
    return h ? h : 1;
}

static state *find_state(uint64_t key)
{
    size_t i, k;

    if (2 * n_states >= states_cap) {
        state *old = states;
        size_t old_cap = states_cap;
        states_cap = old_cap ? 4 * old_cap : (size_t)1 << 14;
        states = (state *)calloc(states_cap, sizeof *states);
        if (!states) abort();
        for (k = 0; k < old_cap; k++) {
            if (!old[k].key) continue;
            for (i = old[k].key & (states_cap - 1); states[i].key;)
                i = (i + 1) & (states_cap - 1);
            states[i] = old[k];
        }
        free(old);
    }
    for (i = key & (states_cap - 1); states[i].key && states[i].key != key;)
        i = (i + 1) & (states_cap - 1);
    return &states[i];
}

/* Whether it could go on now. */
static bool enabled(int i)
{
    const thread *t = &w.th[i];
    int k;

    switch (t->at) {
    case AT_START:
        if (w.owner >= 0) return false; /* what most take first */
        for (k = 0; k < i; k++) /* the first of those that are alike */
            if (w.th[k].at == AT_START && w.th[k].fn == t->fn) return false;
        return true;
    case AT_POINT:
    case AT_CHOICE: return true;
    case AT_LOCK:
    case AT_RELOCK: return w.owner < 0;
    case AT_POLL: return w.pipe || t->timeout == 0;
    case AT_JOIN: return w.th[t->target].at == AT_END;
    case AT_NOTHING:
    case AT_COND:
    case AT_END:
    default: return false;
    }
}

/* What can happen next; first that the same thread goes on. */
static int look_around(option *out)
{
    int i, n = 0, first = w.current;

    if (w.th[first].at == AT_CHOICE) { /* nobody sees it: no need to switch */
        for (; n < w.th[first].n; n++) {
            out[n].thread = (uint8_t)first;
            out[n].alt = (uint8_t)n;
        }
        return n;
    }
    for (i = -1; i < w.n_threads; i++) {
        int id = i < 0 ? first : i;
        if ((i == first && i >= 0) || !enabled(id)) continue;
        out[n].thread = (uint8_t)id;
        out[n++].alt = 0;
    }
    if (n && !now.impatient) return n;
    for (i = 0; i < w.n_threads; i++) /* time passes when all wait */
        if (w.th[i].at == AT_POLL && !w.pipe && w.th[i].timeout > 0 &&
            w.th[i].timeout < LONG_WAIT) {
            out[n].thread = (uint8_t)i;
            out[n++].alt = 0;
        }
    return n;
}

static bool walking; /* not in the walker, but in what it walks through */

static __attribute__((noinline)) void step(option o)
{
    thread *t = &w.th[o.thread];

    w.current = o.thread;
    w.alt = o.alt;
    n_steps++;
    walking = true;
    /* what calls have left below a stack is no part of the state */
    memset(t->low - 4096, 0, 4096);
    if (_setjmp(walker) == 0) _longjmp(t->go, 1);
    walking = false;
}

/* How long one step may take, in time of this process. */
static void limit_step(int seconds)
{
    struct itimerval t;

    memset(&t, 0, sizeof t);
    t.it_value.tv_sec = seconds;
    setitimer(ITIMER_VIRTUAL, &t, NULL);
}

static void crashed(int sig)
{
    if (!walking) abort(); /* the walker itself */
    w.failed = sig == SIGVTALRM ? "goes on for ever" : "crash";
    _longjmp(walker, 1);
}

/* A schedule is what was chosen where there was a choice: a digit for a
 * thread, a letter for an alternative. */
static void print_schedule(void)
{
    size_t k;

    printf("WALK_REPLAY=%s:", now.name);
    for (k = 0; k < depth; k++) {
        const node *n = &nodes[k];
        option o = n->options[n->next - 1];
        if (n->n < 2) continue;
        putchar(n->options[0].thread == n->options[1].thread ? 'a' + o.alt
                                                             : '0' + o.thread);
    }
    printf("\n");
}

static void print_threads(void)
{
    int i;

    for (i = 0; i < w.n_threads; i++)
        printf("    thread %d: %s\n", i,
               w.th[i].at == AT_END ? "has ended" : w.th[i].where);
}

static bool all_ended(void)
{
    int i;

    for (i = 0; i < w.n_threads; i++)
        if (w.th[i].at != AT_END) return false;
    return true;
}

static void push(unsigned preemptions, uint64_t key)
{
    node *n = &nodes[depth];

    if (depth == MAX_DEPTH) {
        w.failed = "the schedule is too long";
        return;
    }
    n->key = key;
    n->paths = 0;
    n->next = 0;
    n->preemptions = (uint8_t)preemptions;
    n->n = (uint8_t)look_around(n->options);
    if (!n->n) w.failed = "nobody can go on";
    depth++;
    if (depth > deepest) deepest = depth;
    if (n->n > 1) save(n);
    else n->snapshot = copies_len;
}

static void *body(void *arg);

static void begin(void)
{
    memset(&w, 0, sizeof w);
    w.owner = -1;
    depth = copies_len = 0;
    spawn(body, NULL);
}

/* All schedules of the plan; how many, or -1: one fails. */
static double walk(void)
{
    double paths = 0;

    n_states = 0;
    if (states) memset(states, 0, states_cap * sizeof *states);
    begin();
    push(0, 0);
    while (depth && !w.failed) {
        node *n = &nodes[depth - 1];
        unsigned preemptions = n->preemptions;
        option o;
        uint64_t key;
        state *s;
        int k;

        if (n->next == n->n) {
            if (n->key) find_state(n->key)->paths = n->paths;
            copies_len = n->snapshot;
            depth--;
            if (!depth) {
                paths = n->paths;
                break;
            }
            nodes[depth - 1].paths += n->paths;
            continue;
        }
        if (n->next) restore(n);
        o = n->options[n->next++];
        if (n->options[0].thread == w.current && o.thread != w.current &&
            ++preemptions > max_preemptions)
            continue;
        for (k = 0; k < 100; k++) { /* on, as long as there is no choice */
            option only[OPTIONS];
            step(o);
            if (w.failed || all_ended() || look_around(only) != 1) break;
            o = only[0];
        }
        if (w.failed) break;
        if (all_ended()) {
            n->paths += 1;
            continue;
        }
        key = hash_state(preemptions);
        s = find_state(key);
        if (s->key && s->paths < 0) {
            w.failed = "busy waiting: a state comes again";
        } else if (s->key) {
            n->paths += s->paths;
        } else {
            s->key = key;
            s->paths = -1;
            if ((++n_states & 0x3FFF) == 0) limit_step(10);
            push(preemptions, key);
        }
    }
    return w.failed ? -1 : paths;
}

/* ---- the scenes ---------------------------------------------------------- */

#define TOKENS 4 /* of a call; its window takes half */
#define WINDOW 2

static bool is_start(llmcb_event_kind kind)
{
    return kind == LLMCB_CHAT_MODEL_START || kind == LLMCB_CHAIN_START;
}

static bool is_error(llmcb_event_kind kind)
{
    return kind == LLMCB_LLM_ERROR || kind == LLMCB_CHAIN_ERROR;
}

static bool is_finish(llmcb_event_kind kind)
{
    return is_error(kind) || kind == LLMCB_LLM_END || kind == LLMCB_CHAIN_END;
}

static unsigned n_seats(void)
{
    return (unsigned)strlen(now.table);
}

/* Until somebody cancels or fails, nobody misses anything. */
static bool strict(void)
{
    return !w.cancelled && !w.raised && !now.impatient;
}

static seen *enter(llmcb_handler *h, const llmcb_event *ev)
{
    seat *me = (seat *)(void *)h;
    size_t r = ev->run == w.run[0] || !w.run[0] ? 0 : 1;
    seen *s = &me->of[r];
    unsigned i;

    say("%c enters %s of run %u", me->kind, llmcb_event_name(ev->kind),
        (unsigned)r);
    MUST(!w.told || now.impatient, "an event after the operation was done");
    MUST(!s->inside, "two events of a run at once");
    MUST(me->inside == 0 || me->kind == 'P' || me->kind == 'A' ||
             me->kind == 'M',
         "a sync handler is entered twice");
    MUST(!s->finished, "an event after the finish");
    MUST(ev->seq > s->seq, "out of order, or twice");
    MUST(is_start(ev->kind) == !s->started, "a start that is not the first");
    MUST(!strict() || ev->seq == s->seq + 1, "an event was left out");
    for (i = 0; i < n_seats(); i++) {
        const seat *other = &w.seats[i];
        const seen *o = &other->of[r];
        if (other == me) continue;
        if (is_finish(ev->kind))
            MUST(!o->inside || o->finishing || now.impatient,
                 "a finish before the others are done");
        if (!strict()) continue;
        MUST(other->kind != 'I' || me->kind == 'I' || o->done >= ev->seq,
             "before the inline handlers");
        MUST(other->kind != 'E' || o->done + 1 >= ev->seq, "out of lock step");
        MUST(!is_finish(ev->kind) || o->done + 1 >= ev->seq,
             "a finish before the others have got all");
    }
    s->inside = true;
    me->inside++;
    s->started = true;
    s->seq = ev->seq;
    s->finishing = is_finish(ev->kind);
    if (ev->token || ev->data) {
        const char *text = ev->token ? ev->token->text.ptr : ev->data->text.ptr;
        unsigned which = (unsigned)(*text - '0');
        MUST(which <= 9, "not what was sent");
        MUST(now.scene == 'R' || w.cancelled || which == s->tokens,
             "not the token that is due");
        MUST(which == 9 || which >= s->tokens, "tokens out of order");
        s->tokens++;
    }
    if (s->finishing) {
        MUST(is_error(ev->kind) == !!ev->error, "no error in an error event");
        MUST(w.raised || now.impatient || s->n + ev->skipped + 1 == ev->seq,
             "skipped is not what was skipped");
        MUST(!strict() || !ev->skipped, "skipped without a cancel");
    }
    s->n++;
    return s;
}

static int leave(llmcb_handler *h, const llmcb_event *ev, seen *s)
{
    seat *me = (seat *)(void *)h;

    say("%c leaves", me->kind);
    s->inside = false;
    me->inside--;
    s->done = ev->seq;
    if (s->finishing) s->finished = true;
    if (me->kind != 'R' || s->tokens != 2 || !(ev->token || ev->data))
        return 0;
    w.raised = true;
    return 7;
}

static void cancel_op(const char *who)
{
    const llmcbi_run *run = (const llmcbi_run *)(const void *)w.run[0];

    w.cancelled = true;
    say("%s cancels", who);
    llmcb_op_cancel(w.op[0]);
    w.cancel_over = true;
    /* a loop that waits, or is about to, sees it before all else */
    if (w.th[0].at == AT_POLL && run->state < LLMCBI_RUN_DRAINED)
        w.must_cancel = true;
}

static int on_sync(llmcb_handler *h, const llmcb_event *ev)
{
    seen *s = enter(h, ev);
    llmcb_str nine = { "9", 1 };

    if (now.cancel == 'H' && !w.cancelled && choose(2, "to cancel or not"))
        cancel_op("a handler");
    if (now.scene == 'R' && ev->data && s->tokens == 1 && !w.posted &&
        w.current != 0) {
        w.posted = 1;
        if (llmcb_run_text(ev->run, nine) == LLMCB_OK)
            w.posted += (unsigned)(1 + (ev->run != w.run[0]));
    }
    if (w.current) point("in a handler");
    return leave(h, ev, s);
}

static llmcb_step on_async(llmcb_task *t, llmcb_handler *h,
                           const llmcb_event *ev)
{
    bool ever = silent() && ev->seq == 3 && !is_finish(ev->kind);

    LLMCB_BEGIN(t);
    *(seen **)t->frame = enter(h, ev);
    LLMCB_AWAIT(t, llmcb_sleep(t, ever                ? LLMCB_FOREVER
                                  : now.virtual_clock ? 3
                                                      : 0));
    return leave(h, ev, *(seen **)t->frame) ? LLMCB_EINVAL : LLMCB_DONE;
    LLMCB_END(t);
}

static void take_seats(llmcb_handler **list)
{
    unsigned i;

    for (i = 0; i < n_seats(); i++) {
        seat *s = &w.seats[i];
        llmcb_handler *h = &s->h;
        bool a = now.table[i] == 'A', m = now.table[i] == 'M';
        s->kind = now.table[i];
        h->frame_size = sizeof(seen *);
        h->flags = s->kind == 'P'   ? LLMCB_PARALLEL
                   : s->kind == 'I' ? LLMCB_INLINE
                   : s->kind == 'E' ? LLMCB_AWAIT_EACH
                   : s->kind == 'R' ? LLMCB_RAISE
                                    : 0;
        if (a || m) {
            h->async.on_chat_model_start = h->async.on_llm_end = on_async;
            h->async.on_chain_start = h->async.on_chain_end = on_async;
            h->async.on_llm_error = h->async.on_chain_error = on_async;
        } else {
            h->sync.on_chat_model_start = h->sync.on_llm_end = on_sync;
            h->sync.on_chain_start = h->sync.on_chain_end = on_sync;
            h->sync.on_llm_error = h->sync.on_chain_error = on_sync;
        }
        if (a)
            h->async.on_llm_new_token = h->async.on_text = on_async;
        else
            h->sync.on_llm_new_token = h->sync.on_text = on_sync;
        if (a || m)
            h->async.on_custom_event = on_async;
        else
            h->sync.on_custom_event = on_sync;
        list[i] = h;
    }
}

/* -- the server of a call: tokens, alone and together, and the end */

#define TOKEN(n, tail) \
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" n tail \
    "\"}}]}\n\n"
#define LAST(n) "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" \
    n "\"},\"finish_reason\":\"stop\"}]}\n\n"
#define TEN(x) x x x x x x x x x x
#define TAIL TEN(TEN("........"))

static void serve(void *arg);

static void serve_on(void)
{
    if (w.fed < (silent() ? 2 : 4))
        llmcb_loop_post(w.loop, serve, NULL);
}

static void serve(void *arg)
{
    static const char *const small[] = { TOKEN("0", ""),
                                         TOKEN("1", "") TOKEN("2", ""),
                                         LAST("3"), "data: [DONE]\n\n" };
    static const char *const large[] = { TOKEN("0", TAIL),
                                         TOKEN("1", TAIL) TOKEN("2", TAIL),
                                         LAST("3"), "data: [DONE]\n\n" };
    const char *piece = (now.large ? large : small)[w.fed];
    static const llmcb_str name = { "content-type", 12 },
                           value = { "text/event-stream", 17 };
    const llmcbi_run *run = (const llmcbi_run *)(const void *)w.run[0];
    bool more;

    (void)arg;
    if (!w.x) return; /* let go of meanwhile */
    if (!w.fed) {
        llmcb_exchange_connected(w.x);
        llmcb_exchange_status(w.x, 200);
        llmcb_exchange_header(w.x, name, value);
    }
    MUST(!w.paused, "data while paused");
    say("the server sends piece %u", w.fed);
    more = llmcb_exchange_data(w.x, piece, strlen(piece));
    MUST(run->head - run->slowest <= WINDOW, "more than the window");
    w.fed++;
    w.paused = !more;
    if (more && w.x) serve_on();
}

static llmcb_code server_start(llmcb_transport *tr, llmcb_exchange *x,
                               const llmcb_request *q)
{
    unsigned i;

    (void)tr;
    (void)q;
    MUST(!w.x && !w.fed, "a second request");
    for (i = 0; i < n_seats() && strict(); i++)
        MUST(w.seats[i].of[0].done == 1, "a request before the start is told");
    w.x = x;
    return llmcb_loop_post(w.loop, serve, NULL);
}

static void server_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    MUST(w.x == x && w.paused, "resumed, but not paused");
    w.paused = false;
    serve_on();
}

static void server_forget(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    MUST(w.x == x, "an exchange that is over");
    w.x = NULL;
}

static void start_call(llmcb_handler **list)
{
    llmcb_chat_desc d;
    llmcb_message m;

    memset(&d, 0, sizeof d);
    memset(&m, 0, sizeof m);
    w.tr.start = server_start;
    w.tr.resume = server_resume;
    w.tr.release = w.tr.cancel = server_forget;
    llmcb_transport_init(w.loop, &w.tr);
    d.streaming = true;
    d.base_url = "http://localhost/v1";
    d.api_key = "";
    d.connect_ms = d.first_byte_ms = d.idle_ms = LLMCB_FOREVER;
    d.transport = &w.tr;
    d.callbacks = list;
    d.n_callbacks = n_seats();
    d.limits.window_events = WINDOW;
    if (now.impatient) d.handler_ms = 5;
    m.content = "hi";
    w.chat = llmcb_chat_new(w.loop, &d);
    w.op[0] = llmcb_chat_generate(w.chat, &m, 1, NULL);
    w.run[0] = llmcb_op_run(w.op[0]);
}

/* -- two runs of the same handlers, with a text and a custom event each */

static void start_runs(llmcb_handler **list)
{
    llmcb_run_desc d;
    llmcb_config c;
    int i;

    memset(&d, 0, sizeof d);
    memset(&c, 0, sizeof c);
    c.callbacks = list;
    c.n_callbacks = n_seats();
    for (i = 0; i < 2; i++) {
        w.op[i] = llmcb_run_start(w.loop, &d, &c);
        w.run[i] = llmcb_op_run(w.op[i]);
    }
    for (i = 0; i < 2; i++) {
        llmcb_run *run = llmcb_op_run(w.op[i]);
        llmcb_run_text(run, llmcb_text("0"));
        llmcb_run_custom(run, "custom", llmcb_text("1"));
    }
    for (i = 0; i < 2 && !silent(); i++)
        llmcb_run_end(llmcb_op_run(w.op[i]), llmcb_text("all"));
}

/* ---- the thread of the loop ---------------------------------------------- */

static void posted(void *arg)
{
    (void)arg;
    if (!w.let_go) cancel_op("a post");
}

static void *canceller(void *arg)
{
    (void)arg;
    w.cancelled = true;
    if (now.scene == 'R') llmcb_op_cancel(w.op[1]); /* first another */
    if (now.cancel == 'p')
        MUST(llmcb_loop_post(w.loop, posted, NULL) == LLMCB_OK, "no post");
    else
        cancel_op("a thread");
    return NULL;
}

static bool all_done(void)
{
    return w.freed ? !llmcb_loop_alive(w.loop)
                   : llmcb_op_done(w.op[0]) && llmcb_op_done(w.op[1]);
}

static void check_end(bool destroyed)
{
    unsigned i, r, n_runs = now.scene == 'R' ? 2 : 1;

    for (i = 0; i < n_seats(); i++)
        for (r = 0; r < n_runs; r++) {
            const seen *s = &w.seats[i].of[r];
            unsigned want = TOKENS;
            if (now.scene == 'R')
                want = 2 + (w.posted == r + 2 ? 1 : 0);
            if (now.impatient) continue;
            MUST(!s->inside, "done, but a handler is inside");
            MUST(s->started == s->finished, "not exactly one finish");
            MUST(!strict() || s->finished, "no finish");
            MUST(!strict() || s->tokens == want, "tokens are missing");
        }
    if (destroyed) return;
    for (r = 0; r < n_runs; r++) {
        llmcb_code code = llmcb_op_code(w.op[r]);
        MUST(code == LLMCB_OK ||
                 (code == LLMCB_ECANCELLED && w.cancelled) ||
                 (code == LLMCB_EHANDLER && w.raised) ||
                 (code == LLMCB_ETIMEDOUT && now.impatient),
             "not that code");
        MUST(code != LLMCB_OK || w.cancelled || !w.raised, "not EHANDLER");
        MUST(code != LLMCB_OK || !w.must_cancel || r, "a cancel was lost");
    }
}

static void *body(void *arg)
{
    llmcb_handler *list[SEATS];
    llmcb_loop_desc d;
    int thread = 0;

    (void)arg;
    memset(&d, 0, sizeof d);
    memset(list, 0, sizeof list);
    d.allocator.resize = heap_resize;
    d.workers = now.workers;
    d.virtual_clock = now.virtual_clock;
    w.loop = llmcb_loop_new(&d);
    take_seats(list);
    if (now.scene == 'R')
        start_runs(list);
    else
        start_call(list);
    if (strchr("Ttp", now.cancel)) thread = spawn(canceller, NULL);
    while (!all_done()) {
        if (strchr("LFD", now.cancel) && !w.cancelled &&
            choose(2, "to cancel or not")) {
            if (now.cancel == 'L') {
                cancel_op("the loop");
            } else {
                say("the loop frees");
                w.cancelled = w.freed = w.let_go = true;
                if (now.cancel == 'D') break;
                llmcb_op_free(w.op[0]);
                llmcb_op_free(w.op[1]);
            }
        }
        llmcb_loop_run_once(w.loop, LLMCB_FOREVER);
    }
    if (!(now.cancel == 'D' && w.freed)) {
        w.told = true;
        check_end(w.freed);
    }
    if (thread) {
        w.th[0].target = thread;
        stop_at(AT_JOIN, "joins");
    }
    w.let_go = true;
    if (!w.freed) {
        llmcb_op_free(w.op[0]);
        llmcb_op_free(w.op[1]);
    }
    llmcb_chat_free(w.chat);
    MUST(llmcb_loop_free(w.loop) == LLMCB_OK, "the loop is not freed");
    w.loop = NULL;
    check_end(true);
    MUST(!w.blocks, "memory was not freed");
    return NULL;
}

/* ---- what is walked ------------------------------------------------------ */

static double all_paths;
static size_t all_states, all_plans, most_states;

static void replay(const char *steps)
{
    option o[OPTIONS];

    replaying = true;
    begin();
    while (!w.failed && !all_ended()) {
        int n = look_around(o), k = 0;
        if (!n) w.failed = "nobody can go on";
        if (n > 1 && *steps) {
            for (k = 0; k < n; k++)
                if (o[0].thread == o[1].thread
                        ? o[k].alt == *steps - 'a'
                        : o[k].thread == *steps - '0')
                    break;
            steps++;
            if (k == n) w.failed = "not a schedule of this scene";
        }
        if (!w.failed) step(o[k]);
    }
    printf("  %s\n", w.failed ? w.failed : "all is well");
    print_threads();
    if (w.failed) TEST_FAIL("%s: %s", now.name, w.failed);
}

static void name_plan(void)
{
    snprintf(now.name, sizeof now.name, "%s/%s/%c/%u%s",
             now.scene == 'R' ? "runs" : "call", *now.table ? now.table : "-",
             now.cancel, now.workers,
             now.virtual_clock ? "v"
             : now.large       ? "l"
             : now.impatient   ? "i"
                               : "");
}

static void walk_plan(void)
{
    const char *only = getenv("WALK_ONLY"), *again = getenv("WALK_REPLAY");
    double paths;

    name_plan();
    if (test_failures_here) return; /* the first failure says enough */
    if (only && !strstr(now.name, only)) return;
    if (again) {
        size_t n = strlen(now.name);
        if (strncmp(again, now.name, n) == 0 && again[n] == ':')
            replay(again + n + 1);
        return;
    }
    limit_step(10);
    paths = walk();
    limit_step(0);
    if (paths < 0) {
        TEST_FAIL("%s: %s, after %zu states", now.name, w.failed, n_states);
        print_threads();
        print_schedule();
    }
    if (getenv("WALK_TELL"))
        printf("  %s: %.3g schedules, %zu states, depth %zu\n",
               now.name, paths, n_states, deepest);
    if (paths > 0) all_paths += paths;
    all_states += n_states;
    if (n_states > most_states) most_states = n_states;
    all_plans++;
}

/* How often a schedule may switch away from a thread that could go on; those
 * within a bound include all with fewer. Most of the gate's time goes to
 * where workers and a cancel meet. */
static unsigned bound_of(unsigned n, char cancel)
{
    const char *deep = getenv("WALK"), *bound = getenv("WALK_PREEMPTIONS");
    bool outside = strchr("HTtp", cancel) != NULL;

    if (bound) return (unsigned)atoi(bound);
    if (deep && strcmp(deep, "full") == 0) return NO_BOUND;
    if (now.scene == 'R' && cancel == 't' && *now.table == 'A') return 2;
    /* what makes many states counts as one handler more */
    if (now.scene == 'R' || now.impatient || now.virtual_clock) n++;
    if (deep && now.scene == 'R') /* 3 workers, and cancels of two */
        return (outside ? 4u : 5u) - n;
    if (deep) return n < 3 ? NO_BOUND : outside ? 2 : 3;
    if (n < 2) return outside ? 2 : NO_BOUND;
    if (n == 2) return cancel == '-' ? 2 : strchr("tp", cancel) ? 0 : 1;
    return cancel == '-' ? 1 : 0;
}

/* All tables of n handlers; their order is that of the list. */
static void walk_tables(const char *kinds, unsigned n, const char *cancels)
{
    const unsigned last = (unsigned)strlen(kinds) - 1;
    unsigned i[SEATS], k;

    memset(i, 0, sizeof i);
    for (;;) {
        const char *c;
        memset(now.table, 0, sizeof now.table);
        for (k = 0; k < n; k++)
            now.table[k] = kinds[i[k]];
        for (c = cancels; *c; c++) {
            now.cancel = *c;
            max_preemptions = bound_of(n, *c);
            walk_plan();
        }
        for (k = n; k && i[k - 1] == last;)
            k--;
        if (!k) return;
        i[k - 1]++;
        for (; k < n; k++)
            i[k] = i[k - 1];
    }
}

#define CANCELS "-LHTFDtp"

static void walk_calls(unsigned n)
{
    now.scene = 'C';
    now.workers = 2;
    walk_tables("SPAIERM", n, CANCELS);
}

TEST(walk_calls_of_one)
{
    walk_calls(0);
    walk_calls(1);
}

TEST(walk_calls_of_two)
{
    walk_calls(2);
}

TEST(walk_calls_of_three)
{
    walk_calls(3);
}

/* Time passes when there is nothing to do. */
TEST(walk_virtual_clock)
{
    now.scene = 'C';
    now.workers = 2;
    now.virtual_clock = true;
    walk_tables("SAM", 1, CANCELS);
    walk_tables("SAM", 2, getenv("WALK") ? CANCELS : "-");
    now.virtual_clock = false;
}

TEST(walk_large_tokens)
{
    now.scene = 'C';
    now.workers = 2;
    now.large = true;
    walk_tables("SPME", 1, "-LF");
    if (getenv("WALK")) walk_tables("SPAME", 2, CANCELS);
    now.large = false;
}

/* A handler may be given up at any moment. */
TEST(walk_impatience)
{
    now.scene = 'C';
    now.workers = 2;
    now.impatient = true;
    walk_tables("SAME", 1, "-LHFD");
    if (getenv("WALK")) walk_tables("SPAME", 2, CANCELS);
    now.impatient = false;
}

/* With 3 workers two strands run at once: one is left for blocking work. */
TEST(walk_runs)
{
    now.scene = 'R';
    now.workers = 3;
    walk_tables("SPAIERM", 1, "-LHTFDt");
    walk_tables("SPAIERM", 2, getenv("WALK") ? "-LHTFDt" : "-");
}

int main(int argc, char **argv)
{
    static char alternate[65536];
    stack_t ss;
    struct sigaction sa;
    struct timespec from, to;
    int result;

    memset(&ss, 0, sizeof ss);
    memset(&sa, 0, sizeof sa);
    ss.ss_sp = alternate;
    ss.ss_size = sizeof alternate;
    sigaltstack(&ss, NULL);
    sa.sa_handler = crashed;
    sa.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &sa, NULL);
    sigaction(SIGBUS, &sa, NULL);
    sigaction(SIGVTALRM, &sa, NULL);
    make_stacks();
    clock_gettime(CLOCK_MONOTONIC, &from);
    result = test_main(argc, argv);
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("  %zu scenes, %.3g schedules, %zu states, %zu steps, "
           "at most %zu states, %.1f s\n",
           all_plans, all_paths, all_states, n_steps, most_states,
           (double)(to.tv_sec - from.tv_sec) +
               (double)(to.tv_nsec - from.tv_nsec) / 1e9);
    return result;
}
#endif
