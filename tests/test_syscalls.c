/* Rows 105 to 107 of the fault catalogue: every system call of llmcb.h fails
 * at each of its places, once and from then on, with each error that it can
 * have; then together with an allocation. Whatever fails: the call ends in
 * success or in an error that is mapped as the table says, T1 to T9 of
 * trial.h hold, and no turn is made without a cause.
 *
 * It must also pass with -DLLMCB_NO_EPOLL. */
#include "trial.h"
#include <sys/wait.h>

/* ---- what a call may say, and what becomes of it ------------------------- */

#define MAY(code) (1u << -(code))
#define ONCE 1 /* not for ever: no kernel would, and nobody could go on */

typedef struct fault {
    sys_call call;
    int error;
    int mode;
    unsigned codes; /* beside LLMCB_OK */
} fault;

/* A loop that cannot be made is no memory to those who go on with NULL. */
#define NO_LOOP MAY(LLMCB_ENOMEM)
/* What could not be recorded is played as an answer that never came. */
#define BAD_TAPE MAY(LLMCB_EIO)

static const fault faults[] = {
    { SYS_open, EMFILE, 0, MAY(LLMCB_ESYS) },
    { SYS_open, EACCES, 0, MAY(LLMCB_ESYS) },
    { SYS_open, EINTR, 0, MAY(LLMCB_ESYS) },
    { SYS_open, ENOMEM, 0, MAY(LLMCB_ESYS) },
    { SYS_fstat, EIO, 0, MAY(LLMCB_ESYS) | BAD_TAPE },
    { SYS_read_wake, EINTR, ONCE, 0 },
    { SYS_read_wake, EAGAIN, ONCE, 0 },
    { SYS_read_random, EINTR, ONCE, 0 },
    { SYS_read_random, EIO, 0, 0 },
    { SYS_read_random, SYS_SHORT, 0, 0 },
    { SYS_read_file, EINTR, ONCE, 0 },
    { SYS_read_file, EIO, 0, MAY(LLMCB_ESYS) },
    { SYS_read_file, SYS_SHORT, ONCE, 0 },
    { SYS_write_wake, EINTR, ONCE, 0 },
    { SYS_write_file, EINTR, ONCE, 0 },
    { SYS_write_file, ENOSPC, 0, BAD_TAPE },
    { SYS_write_file, EIO, 0, BAD_TAPE },
    { SYS_write_file, SYS_SHORT, ONCE, 0 },
    { SYS_close, EINTR, 0, 0 },
    { SYS_close, EIO, 0, 0 },
    { SYS_pipe, EMFILE, 0, 0 },
    { SYS_pipe, ENFILE, 0, 0 },
    { SYS_fcntl, EPERM, 0, 0 },
    { SYS_epoll_create1, EMFILE, 0, 0 },
    { SYS_epoll_create1, ENOMEM, 0, 0 },
    { SYS_epoll_ctl, ENOMEM, 0, MAY(LLMCB_ESYS) },
    { SYS_epoll_ctl, ENOSPC, 0, MAY(LLMCB_ESYS) },
    { SYS_epoll_wait, EINTR, ONCE, 0 },
    { SYS_poll, EINTR, ONCE, 0 },
    { SYS_poll, ENOMEM, ONCE, 0 },
    { SYS_pthread_create, EAGAIN, 0, MAY(LLMCB_ESYS) },
    { SYS_pthread_create, EPERM, 0, MAY(LLMCB_ESYS) },
    { SYS_pthread_init, EAGAIN, 0, NO_LOOP },
    { SYS_pthread_init, ENOMEM, 0, NO_LOOP },
    { SYS_socket, EMFILE, 0, MAY(LLMCB_ESYS) },
    { SYS_socket, ENFILE, 0, MAY(LLMCB_ESYS) },
    { SYS_socket, ENOBUFS, 0, MAY(LLMCB_ESYS) },
    { SYS_socket, ENOMEM, 0, MAY(LLMCB_ESYS) },
    { SYS_socket, EAFNOSUPPORT, 0, MAY(LLMCB_ECONNECT) },
    { SYS_setsockopt, ENOPROTOOPT, 0, 0 },
    { SYS_setsockopt, EINVAL, 0, 0 },
    { SYS_getsockopt, ECONNREFUSED, 0, MAY(LLMCB_ECONNECT) },
    { SYS_getsockopt, EHOSTUNREACH, 0, MAY(LLMCB_ECONNECT) },
    { SYS_getsockopt, ETIMEDOUT, 0, MAY(LLMCB_ECONNECT) },
    { SYS_getsockopt, ENOBUFS, 0, MAY(LLMCB_ECONNECT) },
    { SYS_connect, ECONNREFUSED, 0, MAY(LLMCB_ECONNECT) },
    { SYS_connect, ENETUNREACH, 0, MAY(LLMCB_ECONNECT) },
    { SYS_connect, EADDRNOTAVAIL, 0, MAY(LLMCB_ECONNECT) },
    { SYS_connect, EACCES, 0, MAY(LLMCB_ECONNECT) },
    { SYS_connect, EINTR, 0, 0 },
    { SYS_getpeername, ENOTCONN, 0, 0 },
    { SYS_getpeername, ENOBUFS, 0, 0 },
    { SYS_send, EINTR, ONCE, 0 },
    { SYS_send, EAGAIN, ONCE, 0 },
    { SYS_send, SYS_SHORT, 0, 0 },
    { SYS_send, ECONNRESET, 0, MAY(LLMCB_EIO) },
    { SYS_send, EPIPE, 0, MAY(LLMCB_EIO) },
    { SYS_send, EHOSTUNREACH, 0, MAY(LLMCB_EIO) },
    { SYS_send, ENOBUFS, 0, MAY(LLMCB_ESYS) },
    { SYS_send, ENOMEM, 0, MAY(LLMCB_ESYS) },
    { SYS_recv, EINTR, ONCE, 0 },
    { SYS_recv, EAGAIN, ONCE, 0 },
    { SYS_recv, SYS_SHORT, 0, 0 },
    { SYS_recv, ECONNRESET, 0, MAY(LLMCB_EIO) },
    { SYS_recv, ETIMEDOUT, 0, MAY(LLMCB_EIO) },
    { SYS_recv, ENOMEM, 0, MAY(LLMCB_EIO) },
    { SYS_getaddrinfo, EAI_NONAME, 0, MAY(LLMCB_EDNS) },
    { SYS_getaddrinfo, EAI_AGAIN, 0, MAY(LLMCB_EDNS) },
    { SYS_getaddrinfo, EAI_FAIL, 0, MAY(LLMCB_EDNS) },
    { SYS_getaddrinfo, EAI_MEMORY, 0, MAY(LLMCB_EDNS) | NO_LOOP },
    { SYS_getaddrinfo, EAI_SYSTEM, 0, MAY(LLMCB_EDNS) | MAY(LLMCB_ESYS) }
};
#define N_FAULTS (sizeof faults / sizeof *faults)

/* ---- scenarios ----------------------------------------------------------- */

enum {
    ON_REPLAY,
    ON_SOCK,
    ON_CURL,
    BY_NAME,
    RECORD,
    JOBS,
    CANCEL,
    RESET,
    STREAM_OP,
    LIMITED,
    N_SCENARIOS
};
static const char *const scenario_names[] = { "replay", "sock",   "curl",
                                              "name",   "record", "jobs",
                                              "cancel", "reset",  "stream",
                                              "window" };

/* What fails in a run; zeroed: nothing. */
typedef struct blow {
    const fault *f; /* NULL: no system call */
    long at;
    bool for_ever;
    long alloc; /* this allocation, 0: none */
    bool allocs;
    long curl_alloc; /* of libcurl's own */
} blow;

/* libcurl's own memory */
static long curl_calls, curl_fail_at;
static long curl_live;
static pthread_mutex_t curl_lock = PTHREAD_MUTEX_INITIALIZER;

static server *servers[N_SCENARIOS];
static char scratch[64];
static long calls_made[SYS_N], allocs_made, curl_made;
static long runs_made;

static bool scenario_exists(int scenario)
{
#ifdef LLMCB_NO_CURL
    if (scenario == ON_CURL) return false;
#endif
    return scenario < N_SCENARIOS;
}

static void servers_start(void)
{
    server_script kept = script(CLEAN_KEPT, SERVER_KEEP);
    server_script stall = script(SSE "\r\n" TWO, SERVER_STALL);
    server_script reset = script(SSE "\r\n" TWO, SERVER_RST);

    trial_shared = true;
    servers[ON_SOCK] = server_start(&kept, 1);
    servers[ON_CURL] = server_start(&kept, 1);
    servers[BY_NAME] = server_start(&kept, 1);
    servers[STREAM_OP] = server_start(&kept, 1);
    servers[LIMITED] = server_start(&kept, 1);
    servers[CANCEL] = server_start(&stall, 1);
    servers[RESET] = server_start(&reset, 1);
    strcpy(scratch, "build/tmp-XXXXXX");
    mkdir("build", 0777);
    if (!mkdtemp(scratch)) abort();
}

static void scratch_clean(void)
{
    static const char *const names[] = { "x.http",   "x.segments.json",
                                         "x-2.http", "x-2.segments.json",
                                         "x-3.http", "x-3.segments.json" };
    char path[128];
    size_t i;

    for (i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", scratch, names[i]);
        unlink(path);
    }
}

static void servers_stop(void)
{
    int i;

    for (i = 0; i < N_SCENARIOS; i++) {
        server_stop(servers[i]);
        servers[i] = NULL;
    }
    scratch_clean();
    CHECK_INT(rmdir(scratch), 0);
}

/* -- a coroutine that uses what the loop has */

typedef struct jobs {
    int fds[2];
    llmcb_op *job;
    llmcb_code results[4];
    int ran;
} jobs;

static int jobs_work(void *arg)
{
    (void)arg;
    return 0;
}

static void jobs_post(void *arg)
{
    ((jobs *)arg)->ran++;
}

static llmcb_step jobs_step(llmcb_task *t)
{
    jobs *j = (jobs *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await(t, j->job));
    j->results[0] = t->result;
    LLMCB_AWAIT(t, llmcb_await_fd(t, j->fds[0], LLMCB_READ, LLMCB_FOREVER));
    j->results[1] = t->result;
    LLMCB_AWAIT(t, llmcb_await_blocking(t, jobs_work, NULL));
    j->results[2] = t->result;
    LLMCB_AWAIT(t, llmcb_sleep(t, 1));
    j->results[3] = t->result;
    return j->results[0]   ? j->results[0]
           : j->results[1] ? j->results[1]
                           : j->results[2];
    LLMCB_END(t);
}

/* A recording has failed; what follows is said in words. */
static bool recording;
static int limits_said;

static llmcb_code allowed(const trial *t, const blow *b, llmcb_code code)
{
    unsigned codes = MAY(LLMCB_OK);

    if (b->f) codes |= b->f->codes;
    if (!t->loop) codes |= NO_LOOP;
    if (b->alloc || b->curl_alloc) codes |= MAY(LLMCB_ENOMEM);
    /* the resolver's, as libcurl sees it */
    if (b->curl_alloc) codes |= MAY(LLMCB_EDNS);
    if (b->curl_alloc && code == LLMCB_ELIMIT) {
        limits_said++;
        codes |= MAY(LLMCB_ELIMIT);
    }
    /* nothing may have been recorded */
    if ((b->alloc || (b->f && b->f->call == SYS_pthread_init)) && recording)
        codes |= MAY(LLMCB_ESYS) | BAD_TAPE;
    return (codes & MAY(code)) != 0 ? LLMCB_OK : code;
}

/* The error and what it says of its cause. */
static void check_mapped(const trial *t, const blow *b, const llmcb_error *e)
{
    check_no_canary(e);
    CHECK_STR(llmcb_code_name(allowed(t, b, e->code)), "LLMCB_OK");
    if (!b->f || b->alloc || b->f->error <= 0) return;
    if (b->f->call == SYS_read_file || b->f->call == SYS_open ||
        b->f->call == SYS_fstat || b->f->call == SYS_getaddrinfo || recording)
        return; /* said in words */
    if (e->code == LLMCB_ESYS || e->code == LLMCB_ECONNECT)
        CHECK_INT(e->sys_errno, b->f->error);
}

static void play_jobs(trial *t, const blow *b)
{
    llmcb_op *op;
    jobs j;
    size_t n = 0;

    memset(&j, 0, sizeof j);
    if (pipe(j.fds) != 0 || write(j.fds[1], "x", 1) != 1) abort();
    t->ld.virtual_clock = false;
    t->loop = llmcb_loop_new(&t->ld);
    llmcb_loop_post(t->loop, jobs_post, &j);
    j.job = llmcb_offload(t->loop, jobs_work, NULL);
    op = llmcb_task_start(t->loop, jobs_step, 0, &j);
    while ((!llmcb_op_done(op) || !llmcb_op_done(j.job)) && n++ < t->turns &&
           !sys.hung)
        llmcb_loop_run_once(t->loop, LLMCB_FOREVER);
    CHECK(n < t->turns && !sys.hung);
    /* an await has a code and no more */
    CHECK_STR(llmcb_code_name(allowed(t, b, llmcb_op_code(op))), "LLMCB_OK");
    if (j.job) {
        check_mapped(t, b, llmcb_op_error(j.job));
        CHECK(llmcb_op_done(j.job));
    }
    llmcb_op_free(op);
    llmcb_op_free(j.job);
    sys_calm();
    t->heap.fail_at = 0;
    if (t->loop) { /* T6 */
        memset(j.results, 0, sizeof j.results);
        j.job = llmcb_offload(t->loop, jobs_work, NULL);
        op = llmcb_task_start(t->loop, jobs_step, 0, &j);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
        llmcb_op_free(j.job);
    }
    close(j.fds[0]);
    close(j.fds[1]);
}

/* Makes the chat of a scenario; a part that fails is NULL. */
static void open_chat(trial *t, int scenario)
{
    char path[128];
    llmcb_replay_desc d;

    t->loop = llmcb_loop_new(&t->ld);
    t->tr = trial_transport(t);
    if (scenario == RECORD) {
        snprintf(path, sizeof path, "%s/x.http", scratch);
        t->cd.transport = llmcb_record_new(t->loop, t->tr, path);
        if (t->cd.transport) t->chat = llmcb_chat_new(t->loop, &t->cd);
        if (t->chat) { /* one call recorded, then it is played */
            llmcb_op *op = llmcb_chat_generate(t->chat, &question, 1, NULL);
            llmcb_op_wait(op);
            llmcb_op_free(op);
            trial_forget(t);
            llmcb_chat_free(t->chat);
            t->chat = NULL;
            memset(&d, 0, sizeof d);
            d.path = path;
            t->tr = llmcb_replay_new(t->loop, &d);
        } else {
            t->tr = NULL;
        }
    }
    t->cd.transport = t->tr;
    if (t->tr) t->chat = llmcb_chat_new(t->loop, &t->cd);
}

static void ask(trial *t, int scenario)
{
    const llmcb_chunk *chunk;

    if (scenario == STREAM_OP) {
        t->op = llmcb_chat_stream(t->chat, &question, 1, NULL);
        while (!sys.hung && llmcb_op_next(t->op, &chunk))
            continue;
        return;
    }
    trial_ask(t);
    if (scenario == CANCEL) {
        size_t n = 0;
        while (t->r[0]->events < 3 && !llmcb_op_done(t->op) && n++ < t->turns &&
               !sys.hung)
            trial_turn(t);
        CHECK(n < t->turns && !sys.hung);
        llmcb_op_cancel(t->op);
    }
}

/* One run. Whether the blow struck. */
static bool play(int scenario, const blow *b)
{
    int transport =
        scenario == ON_REPLAY || scenario == RECORD || scenario == JOBS ? REPLAY
        : scenario == ON_CURL                                           ? CURL_T
                                                                        : SOCK;
    server_script kept = script(CLEAN_KEPT, SERVER_KEEP);
    bool struck, again;
    char base[64];
    int i;
    trial t;

    runs_made++;
    recording = scenario == RECORD;
    trial_begin(&t, transport, &kept, transport == REPLAY ? 1 : 0);
    if (servers[scenario]) t.cd.base_url = server_base(servers[scenario]);
    if (scenario == BY_NAME) {
        sys_names_of.host = "name.invalid";
        sys_names_of.ports[0] = server_port(servers[scenario]);
        sys_names_of.n = 1;
        snprintf(base, sizeof base, "http://name.invalid/v1");
        t.cd.base_url = base;
        t.cd.allow_cleartext_key = true;
    }
    if (scenario == LIMITED) t.cd.limits.window_events = 1;
    t.unsure = scenario == CANCEL || scenario == RESET;
    t.heap.fail_at = b->alloc;
    t.heap.for_ever = b->allocs;
    curl_calls = 0;
    curl_fail_at = b->curl_alloc;
    sys_plan(b->f ? b->f->call : SYS_N, b->f ? b->at : 0, b->for_ever,
             b->f ? b->f->error : 0);
    if (scenario == JOBS) {
        play_jobs(&t, b);
    } else {
        open_chat(&t, scenario);
        for (i = 0; i < 2; i++) { /* the second on a kept connection */
            llmcb_code code;

            ask(&t, scenario);
            trial_wait(&t);
            trial_check(&t, NULL);
            code = llmcb_op_code(t.op);
            if ((scenario == CANCEL && code == LLMCB_ECANCELLED) ||
                (scenario == RESET &&
                 (code == LLMCB_EIO || code == LLMCB_ETRUNCATED))) {
                check_no_canary(llmcb_op_error(t.op));
            } else {
                check_mapped(&t, b, llmcb_op_error(t.op));
            }
            if (!b->f && !b->alloc && !b->curl_alloc && !t.unsure)
                CHECK_STR(t.r[2]->log, "start|clean|end");
            if (i) break;
            llmcb_op_free(t.op);
            t.op = NULL;
            trial_forget(&t);
        }
    }
    struck = sys_struck() > 0 || (b->alloc && t.heap.calls >= b->alloc) ||
             (b->curl_alloc && curl_calls >= b->curl_alloc);
    memcpy(calls_made, sys.calls, sizeof calls_made);
    /* SO_ERROR is asked for as often, if none is there at once */
    calls_made[SYS_getsockopt] = sys.calls[SYS_getpeername];
    allocs_made = t.heap.calls;
    curl_made = curl_calls;
    sys_calm();
    t.heap.fail_at = curl_fail_at = 0;
    /* What was recorded badly is not played well, nor is what there was no
     * memory to keep. */
    again = !(scenario == RECORD && b->f) && !(transport == REPLAY && b->alloc);
    if (!again) t.unsure = true;
    trial_end(&t);
    if (scenario == RECORD) scratch_clean();
    return struck;
}

static const char *error_name(const fault *f)
{
    if (f->error == SYS_SHORT) return "one byte";
    return f->call == SYS_getaddrinfo ? gai_strerror(f->error)
                                      : strerror(f->error);
}

static bool told(int before, int scenario, const blow *b)
{
    if (before == test_failures_here) return false;
    TEST_FAIL("%s: %s %ld, %s%s; allocation %ld, of libcurl %ld",
              scenario_names[scenario], b->f ? sys_names[b->f->call] : "-",
              b->at, b->f ? error_name(b->f) : "-",
              b->for_ever ? ", for ever" : "", b->alloc, b->curl_alloc);
    return true;
}

/* Every place, every error, both ways. */
static void sweep(int scenario)
{
    long counts[SYS_N];
    int before = test_failures_here, fds = open_fds(), bad = 0;
    blow none;
    size_t k;

    if (!scenario_exists(scenario)) return;
    servers_start();
    memset(&none, 0, sizeof none);
    play(scenario, &none);
    memcpy(counts, calls_made, sizeof counts);
    if (told(before, scenario, &none)) bad = 20;
    for (k = 0; k < N_FAULTS && bad < 20; k++) {
        const fault *f = &faults[k];
        long at;
        int ever;

        for (ever = 0; ever < (f->mode == ONCE ? 1 : 2); ever++)
            for (at = 1; at <= counts[f->call]; at++) {
                blow b;

                memset(&b, 0, sizeof b);
                before = test_failures_here;
                b.f = f;
                b.at = at;
                b.for_ever = ever != 0;
                play(scenario, &b);
                bad += told(before, scenario, &b);
            }
    }
    servers_stop();
    CHECK_INT(open_fds(), fds);
}

#define SWEEP(name, scenario)       \
    TEST(fault_106_syscalls_##name) \
    {                               \
        sweep(scenario);            \
    }
SWEEP(replay, ON_REPLAY)
SWEEP(sock, ON_SOCK)
SWEEP(curl, ON_CURL)
SWEEP(name, BY_NAME)
SWEEP(record, RECORD)
SWEEP(jobs, JOBS)
SWEEP(cancel, CANCEL)
SWEEP(reset, RESET)
SWEEP(stream, STREAM_OP)
SWEEP(window, LIMITED)

/* Every allocation of every scenario; of the one that is reset this is row
 * 107. */
static void sweep_memory(int scenario)
{
    int before, fds = open_fds(), ever;
    long i;

    if (!scenario_exists(scenario)) return;
    servers_start();
    for (ever = 0; ever < 2; ever++)
        for (i = 1;; i++) {
            blow b;

            memset(&b, 0, sizeof b);
            before = test_failures_here;
            b.alloc = i;
            b.allocs = ever != 0;
            if (!play(scenario, &b) || told(before, scenario, &b)) break;
            if (i > 1000) {
                TEST_FAIL("too many allocations");
                break;
            }
        }
    servers_stop();
    CHECK_INT(open_fds(), fds);
}

TEST(fault_105_memory)
{
    int i;

    for (i = 0; i < N_SCENARIOS; i++)
        if (i != RESET) sweep_memory(i);
}

TEST(fault_107_memory_after_reset)
{
    sweep_memory(RESET);
}

/* Pairs, a sample that is always the same. */
#if defined(__SANITIZE_THREAD__)
#define N_PAIRS 20
#else
#define N_PAIRS 60
#endif

TEST(fault_107_pairs)
{
    uint32_t seed = 2463534242u;
    int scenario, fds = open_fds(), bad = 0;
    long n;

    servers_start();
    for (scenario = 0; scenario < N_SCENARIOS; scenario++) {
        long counts[SYS_N], allocs;
        blow none;

        if (!scenario_exists(scenario)) continue;
        memset(&none, 0, sizeof none);
        play(scenario, &none);
        memcpy(counts, calls_made, sizeof counts);
        allocs = allocs_made;
        for (n = 0; n < N_PAIRS && bad < 20; n++) {
            int before = test_failures_here;
            blow b;

            memset(&b, 0, sizeof b);
            do {
                seed = seed * 1664525u + 1013904223u;
                b.f = &faults[(seed >> 8) % N_FAULTS];
            } while (!counts[b.f->call]);
            seed = seed * 1664525u + 1013904223u;
            b.at = 1 + (long)(seed >> 8) % counts[b.f->call];
            seed = seed * 1664525u + 1013904223u;
            b.alloc = 1 + (long)(seed >> 8) % allocs;
            b.for_ever = b.f->mode != ONCE && (seed & 0x10000);
            b.allocs = (seed & 0x20000) != 0;
            play(scenario, &b);
            bad += told(before, scenario, &b);
        }
    }
    servers_stop();
    CHECK_INT(open_fds(), fds);
}

/* ---- libcurl's own memory ------------------------------------------------ */

#ifndef LLMCB_NO_CURL
static bool curl_fails(void)
{
    bool fail;

    pthread_mutex_lock(&curl_lock);
    fail = curl_fail_at && ++curl_calls == curl_fail_at;
    if (!curl_fail_at) curl_calls++;
    if (!fail) curl_live++;
    pthread_mutex_unlock(&curl_lock);
    return fail;
}

static void *curl_malloc(size_t size)
{
    return curl_fails() ? NULL : malloc(size);
}

static void curl_freed(void *p)
{
    if (!p) return;
    pthread_mutex_lock(&curl_lock);
    curl_live--;
    pthread_mutex_unlock(&curl_lock);
    free(p);
}

static void *curl_resize(void *p, size_t size)
{
    if (curl_fails()) return NULL;
    if (p) {
        pthread_mutex_lock(&curl_lock);
        curl_live--;
        pthread_mutex_unlock(&curl_lock);
    }
    return realloc(p, size);
}

static char *curl_copy(const char *s)
{
    return curl_fails() ? NULL : strdup(s);
}

static void *curl_zeroed(size_t n, size_t size)
{
    return curl_fails() ? NULL : calloc(n, size);
}

#if !defined(__SANITIZE_THREAD__) /* it has no threads behind a fork */
/* libcurl is given no memory at each of its places. What it makes of that is
 * an error of ours, and mostly not a limit.
 * Each in a process of its own, since libcurl 7.88 divides by zero in one. */
TEST(fault_105_memory_of_libcurl)
{
    int fds = open_fds(), status, died = 0, limits = 0;
    long i;

    servers_start();
    for (i = 1; i < 3000; i++) {
        pid_t pid;

        fflush(stdout);
        pid = fork();
        if (pid == 0) {
            blow b;
            bool struck;

            memset(&b, 0, sizeof b);
            b.curl_alloc = i;
            test_failures_here = 0; /* of its own */
            signal(SIGFPE, SIG_DFL);
            alarm(60);
            struck = play(ON_CURL, &b);
            told(0, ON_CURL, &b);
            fflush(stdout);
            test_exit(test_failures_here ? 1
                      : !struck          ? 3
                      : limits_said      ? 4
                                         : 0);
        }
        REQUIRE(pid > 0);
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            continue;
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGFPE) {
            died++;
            continue;
        }
        CHECK(WIFEXITED(status));
        if (WEXITSTATUS(status) == 3) break;
        limits += WEXITSTATUS(status) == 4;
        if (WEXITSTATUS(status) != 4) CHECK_INT(WEXITSTATUS(status), 0);
    }
    /* while it reads a head, libcurl says the same of one that is too long;
     * before that, there is none */
    CHECK(limits < 20);
    CHECK(i > 20);
    CHECK(died < 4);
    servers_stop();
    CHECK_INT(open_fds(), fds);
}
#endif
#endif

int main(int argc, char **argv)
{
#ifndef LLMCB_NO_CURL
    /* once, before the library does */
    if (curl_global_init_mem(CURL_GLOBAL_DEFAULT, curl_malloc, curl_freed,
                             curl_resize, curl_copy, curl_zeroed) != CURLE_OK)
        return 1;
#endif
    alarm(160); /* what hangs is killed */
    return test_main(argc, argv);
}
