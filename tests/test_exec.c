/* The thread pool: blocking functions, sync handlers beside them, threads
 * that cannot be made, and the end of the pool. What must be going on at the
 * same time waits for each other; nothing here waits for time. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_SOCKETS */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef LLMCB_NO_CURL
#define LLMCB_NO_CURL
#endif
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int create_left = -1; /* threads until none can be made; -1: all can */
static int created;
static size_t created_stack; /* of the first one */

static int hook_pthread_create(pthread_t *thread, const pthread_attr_t *attr,
                               void *(*fn)(void *), void *arg)
{
    if (create_left == 0) return EAGAIN;
    if (create_left > 0) create_left--;
    /* ThreadSanitizer changes the attributes for those behind it */
    if (attr && !created++) pthread_attr_getstacksize(attr, &created_stack);
    return pthread_create(thread, attr, fn, arg);
}

/* Threads must be joined, not let go: else one may still be inside the loop
 * that is freed. */
static int joined;

static int hook_pthread_join(pthread_t thread, void **result)
{
    joined++;
    return pthread_join(thread, result);
}
#define pthread_join(thread, result) hook_pthread_join(thread, result)

/* A call without a hook stays what it is. */
#define HOOK_pthread_create 0, hook_pthread_create
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

/* A blocking function: says that it has begun, waits, counts. */
typedef struct job {
    gate *begun, *go, *ended;
    int returns;
    int number;
} job;

static pthread_mutex_t ran_mutex = PTHREAD_MUTEX_INITIALIZER;
static int ran[2000], n_ran, now_running, most_running;

static void ran_reset(void)
{
    n_ran = now_running = most_running = 0;
}

static int job_run(void *arg)
{
    job *j = (job *)arg;

    pthread_mutex_lock(&ran_mutex);
    if (++now_running > most_running) most_running = now_running;
    if (n_ran < 2000) ran[n_ran++] = j->number;
    pthread_mutex_unlock(&ran_mutex);
    if (j->begun) gate_add(j->begun);
    if (j->go) gate_wait(j->go, 1);
    pthread_mutex_lock(&ran_mutex);
    now_running--;
    pthread_mutex_unlock(&ran_mutex);
    if (j->ended) gate_add(j->ended);
    return j->returns;
}

static void job_set(job *j, int number, int returns)
{
    memset(j, 0, sizeof *j);
    j->number = number;
    j->returns = returns;
}

/* Threads of this process; -1: the system does not tell. */
static int count_threads(void)
{
    DIR *dir = opendir("/proc/self/task");
    struct dirent *e;
    int n = 0;

    if (!dir) return -1;
    while ((e = readdir(dir)) != NULL) n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

/* A thread that was joined may be listed a moment longer. */
static int count_threads_down_to(int n)
{
    struct timespec moment = { 0, 1000000 };
    int i, got = count_threads();

    for (i = 0; i < 5000 && got > n; i++) {
        nanosleep(&moment, NULL);
        got = count_threads();
    }
    return got;
}

static void *nothing(void *arg)
{
    return arg;
}

/* The count when nothing is going on. The first thread of a process may
 * bring one of a sanitizer with it, so there has to have been one. */
static int count_threads_at_rest(void)
{
    pthread_t thread;
    struct timespec moment = { 0, 1000000 };
    int i, least = count_threads();

    if (pthread_create(&thread, NULL, nothing, NULL) != 0) return -1;
    pthread_join(thread, NULL);
    for (i = 0; i < 20; i++) {
        int got = count_threads();
        if (i == 0 || got < least) least = got;
        nanosleep(&moment, NULL);
    }
    return least;
}

/* A chat that plays a stream of n tokens. */
static llmcb_chat *stream_chat(llmcb_loop *loop, int n)
{
    static const char head[] =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
    static const char token[] =
        "data: {\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,"
        "\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n\n";
    static const char tail[] =
        "data: {\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,"
        "\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    char bytes[8192];
    llmcb_recording recording;
    llmcb_replay_desc replay;
    llmcb_chat_desc desc;
    int i;

    memset(&recording, 0, sizeof recording);
    memset(&replay, 0, sizeof replay);
    memset(&desc, 0, sizeof desc);
    strcpy(bytes, head);
    for (i = 0; i < n; i++) strcat(bytes, token);
    strcat(bytes, tail);
    recording.bytes = bytes;
    recording.len = strlen(bytes);
    recording.end = LLMCB_REPLAY_CLOSE;
    replay.recordings = &recording;
    replay.n_recordings = 1;
    desc.base_url = "http://127.0.0.1:1/v1";
    desc.api_key = "";
    desc.max_retries = -1;
    desc.streaming = true;
    desc.transport = llmcb_replay_new(loop, &replay);
    return llmcb_chat_new(loop, &desc);
}

static llmcb_op *call_start(llmcb_chat *chat, llmcb_handler *handlers, int n)
{
    llmcb_handler *list[16];
    llmcb_message m;
    llmcb_config config;
    int i;

    memset(&m, 0, sizeof m);
    memset(&config, 0, sizeof config);
    for (i = 0; i < n; i++) list[i] = &handlers[i];
    m.content = "hello";
    config.callbacks = list;
    config.n_callbacks = (size_t)n;
    return llmcb_chat_generate(chat, &m, 1, &config);
}

/* A sync handler: counts, and waits at its first token. */
typedef struct slow {
    gate *begun, *go;
    int tokens, finishes;
} slow;

static int slow_token(llmcb_handler *h, const llmcb_event *ev)
{
    slow *s = (slow *)h->user;

    (void)ev;
    if (s->tokens++ == 0) {
        if (s->begun) gate_add(s->begun);
        if (s->go) gate_wait(s->go, 1);
    }
    return 0;
}

static int slow_finish(llmcb_handler *h, const llmcb_event *ev)
{
    (void)ev;
    ((slow *)h->user)->finishes++;
    return 0;
}

static void slow_set(llmcb_handler *h, slow *s, gate *begun, gate *go)
{
    memset(h, 0, sizeof *h);
    memset(s, 0, sizeof *s);
    s->begun = begun;
    s->go = go;
    h->user = s;
    h->sync.on_llm_new_token = slow_token;
    h->sync.on_llm_end = h->sync.on_llm_error = slow_finish;
}

/* ---- results ------------------------------------------------------------ */

TEST(offload_results)
{
    static const struct {
        int returns;
        llmcb_code want;
    } rows[] = { { 0, LLMCB_OK },
                 { LLMCB_EIO, LLMCB_EIO },
                 { LLMCB_EFORK, LLMCB_EFORK },
                 { LLMCB_ECANCELLED, LLMCB_ECANCELLED } };
    counter c;
    llmcb_loop *loop;
    size_t i;

    counter_init(&c);
    loop = loop_with(&c, true, 2);
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        job j;
        llmcb_op *op;
        job_set(&j, 0, rows[i].returns);
        op = llmcb_offload(loop, job_run, &j);
        CHECK(!llmcb_op_done(op)); /* never before it returns */
        CHECK_INT(llmcb_op_wait(op), rows[i].want);
        CHECK_INT(llmcb_op_error(op)->code, rows[i].want);
        llmcb_op_free(op);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

/* A number that is no code must not become one that means something else,
 * above all not success, nor crash. */
TEST(offload_results_that_are_no_codes)
{
    static const int rows[] = { 1, INT_MAX, -23, -1000, INT_MIN };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int status = 0;
        pid_t pid = fork(); /* a sanitizer may end it */

        REQUIRE(pid >= 0);
        if (pid == 0) {
            llmcb_loop *loop = virtual_loop();
            llmcb_code code;
            job j;
            alarm(20);
            job_set(&j, 0, rows[i]);
            code = llmcb_op_wait(llmcb_offload(loop, job_run, &j));
            llmcb_loop_free(loop);
            test_exit(code < 0 && code != LLMCB_ENOMEM ? 0 : 1);
        }
        REQUIRE(waitpid(pid, &status, 0) == pid);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            TEST_FAIL("%d: status %d", rows[i], status);
    }
}

TEST(a_thousand_jobs)
{
    enum { N = 1000 };
    static job j[N];
    static llmcb_op *ops[N];
    static bool seen[N];
    counter c;
    llmcb_loop *loop;
    int i, wrong = 0;

    counter_init(&c);
    loop = loop_with(&c, false, 4);
    ran_reset();
    memset(seen, 0, sizeof seen);
    for (i = 0; i < N; i++) {
        job_set(&j[i], i, i % 7 ? 0 : LLMCB_EIO);
        ops[i] = llmcb_offload(loop, job_run, &j[i]);
    }
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    for (i = 0; i < N; i++) {
        if (llmcb_op_code(ops[i]) != (i % 7 ? LLMCB_OK : LLMCB_EIO)) wrong++;
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(wrong, 0);
    CHECK_INT(n_ran, N);
    for (i = 0; i < n_ran; i++) {
        if (seen[ran[i]]) TEST_FAIL("job %d ran twice", ran[i]);
        seen[ran[i]] = true;
    }
    CHECK(most_running <= 3);
    CHECK_INT(c.live, 0);
    CHECK(!c.wrong_size);
}

/* All threads but one run jobs at the same time: they wait for each other.
 * One stays for the handlers. */
TEST(jobs_use_all_threads_but_one)
{
    static const unsigned workers[] = { 2, 3, 5, 16 };
    size_t i;

    for (i = 0; i < 4; i++) {
        int n = (int)workers[i] - 1, k;
        gate begun = GATE_INIT, go = GATE_INIT;
        llmcb_loop *loop = loop_with(NULL, true, workers[i]);
        job j[32];
        llmcb_op *ops[32];

        ran_reset();
        for (k = 0; k < 2 * n; k++) {
            job_set(&j[k], k, 0);
            j[k].begun = &begun;
            j[k].go = &go;
            ops[k] = llmcb_offload(loop, job_run, &j[k]);
        }
        gate_wait(&begun, n);
        gate_set(&go, 1);
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        CHECK_INT(most_running, n);
        CHECK_INT(n_ran, 2 * n);
        for (k = 0; k < 2 * n; k++) llmcb_op_free(ops[k]);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
}

/* ---- cancel ------------------------------------------------------------- */

/* Of five in the queue some are taken out, then one more is put in: the rest
 * runs in order. Two threads: one job at a time. */
TEST(cancel_in_the_queue)
{
    static const struct {
        bool out[5];
        const char *want;
    } rows[] = { { { false, false, false, false, false }, "b01234e" },
                 { { true, false, false, false, false }, "b1234e" },
                 { { false, false, true, false, false }, "b0134e" },
                 { { false, false, false, false, true }, "b0123e" },
                 { { true, false, true, false, true }, "b13e" },
                 { { false, false, false, true, true }, "b012e" },
                 { { true, true, true, true, true }, "be" } };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        counter c;
        llmcb_loop *loop;
        gate begun = GATE_INIT, go = GATE_INIT;
        job first, last, j[5];
        llmcb_op *ops[7];
        char got[8] = "";
        int k;

        counter_init(&c);
        loop = loop_with(&c, false, 2);
        ran_reset();
        job_set(&first, 'b', 0);
        first.begun = &begun;
        first.go = &go;
        ops[5] = llmcb_offload(loop, job_run, &first);
        gate_wait(&begun, 1);
        for (k = 0; k < 5; k++) {
            job_set(&j[k], '0' + k, 0);
            ops[k] = llmcb_offload(loop, job_run, &j[k]);
        }
        for (k = 0; k < 5; k++)
            if (rows[i].out[k]) llmcb_op_cancel(ops[k]);
        CHECK_INT(llmcb_loop_run_once(loop, 0), LLMCB_OK);
        for (k = 0; k < 5; k++)
            CHECK_INT(llmcb_op_code(ops[k]), rows[i].out[k]
                                                 ? LLMCB_ECANCELLED
                                                 : LLMCB_EBUSY);
        job_set(&last, 'e', 0);
        ops[6] = llmcb_offload(loop, job_run, &last);
        gate_set(&go, 1);
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        for (k = 0; k < n_ran && k < 7; k++) got[k] = (char)ran[k];
        CHECK_STR(got, rows[i].want);
        for (k = 0; k < 7; k++) llmcb_op_free(ops[k]);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
    }
}

/* The operation ends at once, the function goes on and nobody is told; a
 * late cancel changes nothing. */
TEST(cancel_while_it_runs_and_after)
{
    int how;

    for (how = 0; how < 3; how++) { /* cancel, free, both from a thread */
        counter c;
        llmcb_loop *loop;
        gate begun = GATE_INIT, go = GATE_INIT, ended = GATE_INIT;
        job j, quick;
        llmcb_op *op, *other;

        counter_init(&c);
        loop = loop_with(&c, false, 2);
        ran_reset();
        job_set(&j, 0, LLMCB_EIO);
        j.begun = &begun;
        j.go = &go;
        j.ended = &ended;
        op = llmcb_offload(loop, job_run, &j);
        gate_wait(&begun, 1);
        if (how == 1) {
            llmcb_op_free(op);
            op = NULL;
        } else {
            llmcb_op_cancel(op);
            CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
        }
        llmcb_loop_run_once(loop, 0);
        CHECK(!llmcb_loop_alive(loop));
        CHECK_INT(gate_get(&ended), 0);
        gate_set(&go, 1);
        gate_wait(&ended, 1);
        job_set(&quick, 1, LLMCB_EPROTO);
        other = llmcb_offload(loop, job_run, &quick);
        CHECK_INT(llmcb_op_wait(other), LLMCB_EPROTO);
        llmcb_op_cancel(other);
        llmcb_loop_run_once(loop, 0);
        CHECK_INT(llmcb_op_code(other), LLMCB_EPROTO);
        if (op) CHECK_INT(llmcb_op_code(op), LLMCB_ECANCELLED);
        llmcb_op_free(op);
        llmcb_op_free(other);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
    }
}

static void *cancel_thread(void *arg)
{
    llmcb_op **ops = (llmcb_op **)arg;
    int i;

    for (i = 0; i < 200; i += 2) llmcb_op_cancel(ops[i]);
    return NULL;
}

/* Cancelled by another thread while they run, wait or are done: each ends
 * once, with what it returned or as cancelled. */
TEST(cancel_from_another_thread)
{
    static job j[200];
    static llmcb_op *ops[200];
    counter c;
    llmcb_loop *loop;
    pthread_t thread;
    int i, odd = 0;

    counter_init(&c);
    loop = loop_with(&c, false, 3);
    ran_reset();
    for (i = 0; i < 200; i++) {
        job_set(&j[i], i, LLMCB_EPROTO);
        ops[i] = llmcb_offload(loop, job_run, &j[i]);
    }
    REQUIRE(!pthread_create(&thread, NULL, cancel_thread, ops));
    CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
    pthread_join(thread, NULL);
    llmcb_loop_run_once(loop, 0);
    for (i = 0; i < 200; i++) {
        llmcb_code code = llmcb_op_code(ops[i]);
        if (code != LLMCB_EPROTO && (i % 2 || code != LLMCB_ECANCELLED))
            odd++;
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(odd, 0);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(c.live, 0);
}

/* ---- jobs and handlers beside each other -------------------------------- */

/* As many slow functions as there are threads and more; a whole call with a
 * sync handler goes by meanwhile. */
TEST(slow_jobs_do_not_starve_handlers)
{
    static const unsigned workers[] = { 2, 4 };
    int w, k;

    for (w = 0; w < 2; w++) {
        gate begun = GATE_INIT, go = GATE_INIT;
        llmcb_loop *loop = loop_with(NULL, false, workers[w]);
        llmcb_chat *chat = stream_chat(loop, 5);
        job j[8];
        llmcb_op *ops[8], *call;
        llmcb_handler h;
        slow s;

        ran_reset();
        for (k = 0; k < 8; k++) {
            job_set(&j[k], k, 0);
            j[k].begun = &begun;
            j[k].go = &go;
            ops[k] = llmcb_offload(loop, job_run, &j[k]);
        }
        gate_wait(&begun, (int)workers[w] - 1);
        slow_set(&h, &s, NULL, NULL);
        call = call_start(chat, &h, 1);
        CHECK_INT(llmcb_op_wait(call), LLMCB_OK); /* or hangs */
        CHECK_INT(s.tokens, 6);
        CHECK_INT(s.finishes, 1);
        for (k = 0; k < 8; k++) CHECK(!llmcb_op_done(ops[k]));
        gate_set(&go, 1);
        CHECK_INT(llmcb_loop_run(loop), LLMCB_OK);
        for (k = 0; k < 8; k++) llmcb_op_free(ops[k]);
        llmcb_op_free(call);
        llmcb_chat_free(chat);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
}

TEST(slow_handlers_do_not_starve_jobs)
{
    static const unsigned workers[] = { 2, 4 };
    int w, k;

    for (w = 0; w < 2; w++) {
        gate begun = GATE_INIT, go = GATE_INIT;
        llmcb_loop *loop = loop_with(NULL, false, workers[w]);
        llmcb_chat *chat = stream_chat(loop, 5);
        llmcb_handler h[8];
        slow s[8];
        llmcb_op *call;

        for (k = 0; k < 8; k++) slow_set(&h[k], &s[k], &begun, &go);
        call = call_start(chat, h, 8);
        /* every thread that may is inside a handler */
        while (gate_get(&begun) < (int)workers[w] - 1)
            CHECK_INT(llmcb_loop_run_once(loop, 1), LLMCB_OK);
        for (k = 0; k < 20; k++) {
            job j;
            llmcb_op *op;
            job_set(&j, k, LLMCB_EIO);
            op = llmcb_offload(loop, job_run, &j);
            CHECK_INT(llmcb_op_wait(op), LLMCB_EIO); /* or hangs */
            llmcb_op_free(op);
        }
        CHECK(!llmcb_op_done(call));
        gate_set(&go, 1);
        CHECK_INT(llmcb_op_wait(call), LLMCB_OK);
        for (k = 0; k < 8; k++) {
            CHECK_INT(s[k].tokens, 6);
            CHECK_INT(s[k].finishes, 1);
        }
        llmcb_op_free(call);
        llmcb_chat_free(chat);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
}

/* ---- threads ------------------------------------------------------------ */

TEST(threads_are_made_when_needed_and_joined)
{
    static const struct {
        unsigned workers;
        int threads;
    } rows[] = { { 0, 4 }, { 1, 2 }, { 2, 2 }, { 7, 7 }, { 64, 64 },
                 { 1000, 64 } };
    int before = count_threads_at_rest();
    size_t i;

    if (before < 0) SKIP("no /proc/self/task");
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmcb_loop *loop;
        llmcb_op *op;
        job j;

        before = count_threads_down_to(before);
        created = joined = 0;
        job_set(&j, 0, 0);
        loop = loop_with(NULL, true, rows[i].workers);
        llmcb_loop_run_once(loop, 0);
        CHECK_INT(created, 0);
        CHECK_INT(count_threads(), before);
        op = llmcb_offload(loop, job_run, &j);
        CHECK_INT(created, rows[i].threads);
        CHECK_INT(count_threads(), before + rows[i].threads);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
        op = llmcb_offload(loop, job_run, &j);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(created, rows[i].threads); /* once */
        llmcb_op_free(op);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(joined, rows[i].threads);
        CHECK_INT(count_threads_down_to(before), before);
    }
}

static llmcb_step arm_job(llmcb_task *t)
{
    llmcb_code *code = (llmcb_code *)t->self;
    static job j;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_blocking(t, job_run, &j));
    *code = t->result;
    LLMCB_END(t);
}

/* None: an error before anything has begun. One or more: fewer threads, and
 * everything still works, also both kinds of work on a single one. */
TEST(threads_that_cannot_be_made)
{
    int n;

    for (n = 0; n <= 4; n++) {
        counter c;
        llmcb_loop *loop;
        llmcb_chat *chat;
        llmcb_op *ops[10], *call, *task;
        llmcb_code want = n ? LLMCB_OK : LLMCB_ESYS, code = (llmcb_code)1;
        llmcb_handler h[2];
        slow s[2];
        job j[10];
        int i;

        counter_init(&c);
        loop = loop_with(&c, false, 4);
        chat = stream_chat(loop, 5);
        ran_reset();
        created = 0;
        create_left = n;
        for (i = 0; i < 10; i++) {
            job_set(&j[i], i, 0);
            ops[i] = llmcb_offload(loop, job_run, &j[i]);
        }
        CHECK_INT(created, n);
        for (i = 0; i < 2; i++) slow_set(&h[i], &s[i], NULL, NULL);
        call = call_start(chat, h, 2);
        task = llmcb_task_start(loop, arm_job, 0, &code);
        for (i = 0; i < 10; i++) CHECK_INT(llmcb_op_wait(ops[i]), want);
        CHECK_INT(llmcb_op_wait(call), want);
        CHECK_INT(llmcb_op_wait(task), LLMCB_OK);
        CHECK_INT(code, want);
        for (i = 0; i < 2; i++) {
            CHECK_INT(s[i].tokens, n ? 6 : 0);
            CHECK_INT(s[i].finishes, n ? 1 : 0);
        }
        for (i = 0; i < 10; i++) llmcb_op_free(ops[i]);
        create_left = -1;
        /* the next try may be luckier */
        ops[0] = llmcb_offload(loop, job_run, &j[0]);
        CHECK_INT(llmcb_op_wait(ops[0]), LLMCB_OK);
        llmcb_op_free(ops[0]);
        llmcb_op_free(call);
        llmcb_op_free(task);
        llmcb_chat_free(chat);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(c.live, 0);
        CHECK(!c.wrong_size);
    }
}

static int mask_job(void *arg)
{
    return pthread_sigmask(SIG_BLOCK, NULL, (sigset_t *)arg) ? LLMCB_ESYS : 0;
}

TEST(workers_block_all_signals)
{
    llmcb_loop *loop = virtual_loop();
    sigset_t original, before, after, inside;
    llmcb_op *op;
    int i;

    sigemptyset(&inside);
    sigemptyset(&before);
    sigaddset(&before, SIGUSR2);
    pthread_sigmask(SIG_SETMASK, &before, &original);
    op = llmcb_offload(loop, mask_job, &inside);
    pthread_sigmask(SIG_SETMASK, &original, &after);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    for (i = 1; i < 32; i++) {
        if (i == SIGKILL || i == SIGSTOP) continue;
        if (!sigismember(&inside, i)) TEST_FAIL("signal %d", i);
        /* and ours are as they were */
        CHECK_INT(sigismember(&after, i), sigismember(&before, i));
    }
    llmcb_op_free(op);
    llmcb_loop_free(loop);
}

static int deep_job(void *arg)
{
    volatile char room[700 * 1024];
    size_t i, sum = 0;

    for (i = 0; i < sizeof room; i += 512) room[i] = 1;
    for (i = 0; i < sizeof room; i += 512) sum += (size_t)room[i];
    *(size_t *)arg = sum;
    return 0;
}

TEST(workers_have_the_stack_that_was_asked_for)
{
    static const struct {
        size_t asked, got; /* 0: what the system gives */
    } rows[] = { { 0, 256 * 1024 },
                 { 4 * 1024 * 1024, 4 * 1024 * 1024 },
                 { 1, 0 } };
    size_t i;

    for (i = 0; i < 3; i++) {
        llmcb_loop_desc desc;
        llmcb_loop *loop;
        llmcb_op *op;
        size_t sum = 0;
        job j;

        memset(&desc, 0, sizeof desc);
        desc.worker_stack = rows[i].asked;
        loop = llmcb_loop_new(&desc);
        created = 0;
        created_stack = 0;
        job_set(&j, 0, 0);
        op = i == 1 ? llmcb_offload(loop, deep_job, &sum)
                    : llmcb_offload(loop, job_run, &j);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        if (rows[i].got) CHECK_INT(created_stack, rows[i].got);
        else CHECK(created_stack >= 256 * 1024);
        if (i == 1) CHECK_INT(sum, 1400);
        llmcb_op_free(op);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    }
}

/* ---- the end ------------------------------------------------------------ */

/* Freed in the middle of it: what runs is waited for, what is queued never
 * runs, and nothing is left. */
TEST(free_waits_for_what_runs_and_drops_the_queue)
{
    enum { N = 50 };
    int before = count_threads_at_rest(), round;

    for (round = 0; round < 20; round++) {
        counter c;
        llmcb_loop *loop;
        gate begun = GATE_INIT, go = GATE_INIT, ended = GATE_INIT;
        job first, j[N];
        int i;

        counter_init(&c);
        loop = loop_with(&c, false, 3);
        ran_reset();
        job_set(&first, 100, 0);
        first.begun = &begun;
        first.go = &go;
        first.ended = &ended;
        llmcb_op_free(llmcb_offload(loop, job_run, &first));
        gate_wait(&begun, 1);
        for (i = 0; i < N; i++) {
            job_set(&j[i], i, 0);
            j[i].ended = &ended;
            llmcb_offload(loop, job_run, &j[i]);
        }
        gate_set(&go, 1);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(n_ran, gate_get(&ended)); /* none is inside */
        CHECK(n_ran >= 1 && n_ran <= N + 1);
        CHECK_INT(c.live, 0);
        CHECK(!c.wrong_size);
    }
    if (before >= 0) CHECK_INT(count_threads_down_to(before), before);
}

/* It is waited for as long as it takes, if so much is allowed: here it ends
 * because a coroutine is told that the loop goes. */
static llmcb_step lets_go(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000000));
    gate_set((gate *)t->self, 1);
    LLMCB_END(t);
}

TEST(free_waits_as_long_as_it_may)
{
    static const int64_t limits[] = { 100000, INT64_MAX / 2, INT64_MAX };
    size_t i;

    for (i = 0; i < 3; i++) {
        gate begun = GATE_INIT, go = GATE_INIT;
        llmcb_loop_desc desc;
        llmcb_loop *loop;
        job j;

        memset(&desc, 0, sizeof desc);
        desc.shutdown_ms = limits[i];
        loop = llmcb_loop_new(&desc);
        ran_reset();
        job_set(&j, 1, 0);
        j.begun = &begun;
        j.go = &go;
        llmcb_task_start(loop, lets_go, 0, &go);
        llmcb_offload(loop, job_run, &j);
        while (gate_get(&begun) < 1) llmcb_loop_run_once(loop, 1);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        CHECK_INT(n_ran, 1);
        gate_set(&go, 1);
    }
}

/* A function that does not return in time. In a child: what the thread uses
 * is leaked, as documented. */
enum { STUCK_JOB, STUCK_AWAIT, STUCK_HANDLER, STUCK_FREED, STUCK_N };

static gate stuck_begun = GATE_INIT, stuck_go = GATE_INIT,
            stuck_ended = GATE_INIT;
static job stuck_job;

static llmcb_step stuck_step(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_blocking(t, job_run, &stuck_job));
    *(llmcb_code *)t->self = t->result;
    LLMCB_END(t);
}

static int stuck_child(int how)
{
    llmcb_loop_desc desc;
    llmcb_loop *loop;
    llmcb_chat *chat = NULL;
    llmcb_handler h[2];
    llmcb_op *op = NULL;
    llmcb_code told = (llmcb_code)1;
    slow s[2];
    job queued;
    int bits = 0, threads = count_threads_at_rest();

    memset(&desc, 0, sizeof desc);
    desc.shutdown_ms = 60;
    desc.workers = 2;
    loop = llmcb_loop_new(&desc);
    ran_reset();
    job_set(&stuck_job, 1, 0);
    stuck_job.begun = &stuck_begun;
    stuck_job.go = &stuck_go;
    stuck_job.ended = &stuck_ended;
    job_set(&queued, 2, 0);
    if (how == STUCK_AWAIT) {
        llmcb_task_start(loop, stuck_step, 0, &told);
    } else if (how == STUCK_HANDLER) {
        chat = stream_chat(loop, 20);
        slow_set(&h[0], &s[0], &stuck_begun, &stuck_go);
        slow_set(&h[1], &s[1], NULL, NULL);
        call_start(chat, h, 2);
    } else {
        op = llmcb_offload(loop, job_run, &stuck_job);
    }
    while (gate_get(&stuck_begun) < 1) llmcb_loop_run_once(loop, 1);
    if (how == STUCK_FREED) llmcb_op_free(op);
    if (how != STUCK_HANDLER) llmcb_offload(loop, job_run, &queued);
    llmcb_chat_free(chat);
    if (llmcb_loop_free(loop) != LLMCB_ETIMEDOUT) bits |= 1;
    if (how == STUCK_AWAIT && told != LLMCB_ECANCELLED) bits |= 2;
    /* now it returns: its thread ends, and touches nothing that is gone */
    gate_set(&stuck_go, 1);
    if (how != STUCK_HANDLER) gate_wait(&stuck_ended, 1);
    if (threads >= 0 && count_threads_down_to(threads) != threads) bits |= 8;
    if (how != STUCK_HANDLER && n_ran != 1) bits |= 16;
    return bits;
}

TEST(free_gives_up_a_function_that_does_not_return)
{
    int how;

    for (how = 0; how < STUCK_N; how++) {
        int status = 0;
        pid_t pid = fork();

        REQUIRE(pid >= 0);
        if (pid == 0) {
            alarm(30);
            test_exit(stuck_child(how));
        }
        REQUIRE(waitpid(pid, &status, 0) == pid);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            TEST_FAIL("case %d: status %#x", how, (unsigned)status);
    }
}

/* ---- faults ------------------------------------------------------------- */

TEST(every_allocation_fails_once_or_from_then_on)
{
    int forever;

    for (forever = 0; forever < 2; forever++) {
        long i;
        for (i = 0;; i++) {
            counter c;
            llmcb_loop *loop;
            llmcb_op *ops[3];
            bool wanting = false;
            job j[3];
            int k;

            counter_init(&c);
            c.fail_at = i;
            c.forever = forever != 0;
            loop = loop_with(&c, true, 2);
            ran_reset();
            for (k = 0; k < 3; k++) {
                llmcb_code code;
                job_set(&j[k], k, LLMCB_EIO);
                ops[k] = llmcb_offload(loop, job_run, &j[k]);
                code = llmcb_op_wait(ops[k]);
                if (code != LLMCB_EIO) {
                    CHECK_INT(code, LLMCB_ENOMEM);
                    wanting = true;
                }
            }
            for (k = 0; k < 3; k++) llmcb_op_free(ops[k]);
            CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
            CHECK_INT(c.live, 0);
            CHECK(!c.wrong_size);
            CHECK_INT(wanting, c.failed);
            if (!c.failed) break;
            REQUIRE(i < 100);
        }
        CHECK(i >= 8);
    }
}

int main(int argc, char **argv)
{
    alarm(60); /* what hangs is killed */
    return test_main(argc, argv);
}
