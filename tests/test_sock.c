/* [SOCK] at its edges: names that are resolved while nobody waits any more,
 * unix sockets, requests that are larger than what the system takes at once,
 * what comes behind an answer, and connections that have grown old. */
#define LLMCB_NO_CURL
#include "trial.h"

static llmcbi_sock *sock_of(const trial *t)
{
    return (llmcbi_sock *)(void *)t->tr;
}

/* A prompt that no socket takes at once. */
#define LARGE ((size_t)8 << 20)

static char *large_new(void)
{
    char *s = (char *)malloc(LARGE + 1);

    if (!s) abort();
    memset(s, 'x', LARGE);
    s[LARGE] = '\0';
    return s;
}

static void ask_large(trial *t, const char *text)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.role = LLMCB_USER;
    m.content = text;
    t->op = llmcb_chat_generate(t->chat, &m, 1, NULL);
}

/* ---- names --------------------------------------------------------------- */

static gate names_gate;

static void names_wait(void)
{
    gate_pass(&names_gate);
}

static void names_open(trial *t, const server_script *s, size_t n)
{
    static const gate closed = GATE;

    names_gate = closed;
    trial_begin(t, SOCK, s, n);
    sys_names_of.host = "name.invalid";
    sys_names_of.ports[0] = sys_names_of.ports[1] = server_port(t->server);
    sys_names_of.n = 1;
    sys_names_of.wait = names_wait;
    t->cd.base_url = "http://name.invalid/v1";
    t->cd.allow_cleartext_key = true;
}

static void names_close(void)
{
    memset(&sys_names_of, 0, sizeof sys_names_of);
    sys_plan(SYS_N, 0, false, 0);
}

static unsigned finishes(trial *t)
{
    unsigned n = 0;
    int i;

    for (i = 0; i < 3; i++) {
        pthread_mutex_lock(&t->r[i]->m);
        if (t->r[i]->finishes && !t->r[i]->inside) n++;
        pthread_mutex_unlock(&t->r[i]->m);
    }
    return n;
}

/* A resolver cannot be stopped: what it finds in the end is for nobody. */
TEST(cancelled_while_the_name_is_resolved)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    trial t;
    int how;

    for (how = 0; how < 3; how++) {
        names_open(&t, &s, 1);
        trial_open(&t);
        trial_ask(&t);
        while (gate_came(&names_gate) < 1) llmcb_loop_run_once(t.loop, 1);
        if (how == 0) llmcb_op_cancel(t.op);
        if (how == 1) {
            llmcb_op_free(t.op);
            t.op = NULL;
            while (finishes(&t) < 3) llmcb_loop_run_once(t.loop, 1);
        }
        if (how == 0) trial_finish(&t, "start|error:ECANCELLED",
                                   LLMCB_ECANCELLED);
        if (how < 2) CHECK(!sock_of(&t)->conns);
        gate_let(&names_gate, EVERYBODY);
        if (how == 2) { /* it is waited for, and serves */
            trial_finish(&t, "start|clean|end", LLMCB_OK);
            t.no_clean = true;
        }
        trial_end(&t);
        names_close();
    }
}

/* ... and a loop that goes meanwhile waits for it. */
TEST(freed_while_the_name_is_resolved)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    trial t;

    names_open(&t, &s, 1);
    trial_open(&t);
    trial_ask(&t);
    while (gate_came(&names_gate) < 1) llmcb_loop_run_once(t.loop, 1);
    gate_let(&names_gate, EVERYBODY);
    trial_close(&t);
    names_close();
}

/* With no sync handler the first thread is the resolver's. */
TEST(no_thread_for_a_name)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    trial t;

    names_open(&t, &s, 1);
    sys_names_of.wait = NULL;
    t.cd.n_callbacks = 2;
    trial_open(&t);
    sys_plan(SYS_pthread_create, 1, true, EAGAIN);
    trial_ask(&t);
    trial_wait(&t);
    CHECK_INT(llmcb_op_code(t.op), LLMCB_ESYS);
    CHECK_INT(llmcb_op_error(t.op)->sys_errno, EAGAIN);
    CHECK_STR(t.r[0]->log, "start|error:ESYS");
    llmcb_op_free(t.op);
    sys_calm();
    trial_forget(&t);
    trial_ask(&t);
    trial_wait(&t);
    CHECK_INT(llmcb_op_code(t.op), LLMCB_OK);
    t.no_clean = true;
    trial_end(&t);
    names_close();
}

/* Without a limit on connecting the first address has all the time. */
TEST(second_address_without_a_limit)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    trial t;
    int how;

    for (how = 0; how < 2; how++) {
        names_open(&t, &s, 1);
        sys_names_of.wait = NULL;
        sys_names_of.n = 2;
        t.cd.connect_ms = how ? 100000 : LLMCB_FOREVER;
        trial_open(&t);
        sys_plan(SYS_connect, 1, false, ECONNREFUSED);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        CHECK_INT(sys.calls[SYS_connect], 2);
        t.no_clean = true;
        trial_end(&t);
        names_close();
    }
}

/* ---- unix sockets -------------------------------------------------------- */

static void unix_try(sys_call call, int error, llmcb_code want, bool is_there)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    char path[64], base[96];
    server *server;
    int before = test_failures_here;
    trial t;

    mkdir("build", 0777);
    snprintf(path, sizeof path, "build/sock-%ld.sock", (long)getpid());
    trial_begin(&t, SOCK, NULL, 0);
    server = is_there ? server_start_unix(path, &s, 1) : NULL;
    if (is_there && !server) abort();
    snprintf(base, sizeof base, "unix:%s:/v1", path);
    t.cd.base_url = base;
    trial_open(&t);
    sys_plan(call, 1, false, error);
    trial_ask(&t);
    trial_wait(&t);
    CHECK_STR(llmcb_code_name(llmcb_op_code(t.op)), llmcb_code_name(want));
    if (want == LLMCB_ESYS || (want == LLMCB_ECONNECT && error))
        CHECK_INT(llmcb_op_error(t.op)->sys_errno, error);
    if (call != SYS_N) CHECK(sys_struck() > 0);
    sys_calm();
    if (server) {
        llmcb_op_free(t.op);
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
    }
    llmcb_op_free(t.op);
    t.op = NULL;
    llmcb_chat_free(t.chat);
    t.chat = NULL;
    CHECK_INT(llmcb_loop_free(t.loop), LLMCB_OK);
    t.loop = NULL;
    server_stop(server);
    trial_close(&t);
    if (before != test_failures_here)
        TEST_FAIL("%s, %s", sys_names[call], strerror(error));
}

TEST(unix_sockets)
{
    unix_try(SYS_N, 0, LLMCB_OK, true);
    unix_try(SYS_N, 0, LLMCB_ECONNECT, false);
    unix_try(SYS_connect, ECONNREFUSED, LLMCB_ECONNECT, true);
    unix_try(SYS_connect, EACCES, LLMCB_ECONNECT, true);
    unix_try(SYS_connect, EINTR, LLMCB_OK, true);
    /* its queue is full: asked again soon */
    unix_try(SYS_connect, EAGAIN, LLMCB_OK, true);
    unix_try(SYS_socket, EMFILE, LLMCB_ESYS, true);
    unix_try(SYS_socket, ENOMEM, LLMCB_ESYS, true);
    unix_try(SYS_getsockopt, ECONNREFUSED, LLMCB_ECONNECT, true);
}

TEST(long_paths_of_unix_sockets)
{
    struct sockaddr_un a;
    size_t n;

    for (n = sizeof a.sun_path - 1; n <= sizeof a.sun_path; n++) {
        char base[256] = "unix:/", *end = base + 5;
        trial t;

        trial_begin(&t, SOCK, NULL, 0);
        memset(end + 1, 'x', n - 1);
        strcpy(end + n, ":/v1");
        t.cd.base_url = base;
        trial_open(&t);
        trial_ask(&t);
        trial_wait(&t);
        CHECK_INT(llmcb_op_code(t.op),
                  n < sizeof a.sun_path ? LLMCB_ECONNECT : LLMCB_EINVAL);
        t.no_clean = true;
        trial_end(&t);
    }
}

/* ---- sending ------------------------------------------------------------- */

/* In as many pieces as the system likes. */
TEST(large_requests_arrive)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    char *text = large_new();
    int i;
    trial t;

    trial_begin(&t, SOCK, &s, 1);
    trial_open(&t);
    for (i = 0; i < 2; i++) {
        trial_forget(&t);
        ask_large(&t, text);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        CHECK(server_request(t.server, (size_t)i)->body_len > LARGE);
        llmcb_op_free(t.op);
    }
    CHECK(sys.calls[SYS_send] > 2);
    t.op = NULL;
    CHECK_INT(server_connections(t.server), 1);
    trial_end(&t);
    free(text);
}

/* The server answers before it has read the question, and never will. */
static void answer_early(const char *answer, const char *log, llmcb_code code)
{
    char base[64], *text = large_new();
    int listener = listen_narrowly(base, sizeof base), fd = -1;
    trial t;

    trial_begin(&t, SOCK, NULL, 0);
    t.cd.base_url = base;
    trial_open(&t);
    ask_large(&t, text);
    while (fd < 0 && !llmcb_op_done(t.op)) {
        llmcb_loop_run_once(t.loop, 1);
        fd = accept(listener, NULL, NULL);
    }
    /* as much is on its way as there is room for */
    while (sys.calls[SYS_send] < 2) llmcb_loop_run_once(t.loop, 1);
    if (answer && send(fd, answer, strlen(answer), 0) < 0) abort();
    if (!answer) { /* a reset, as it has not read all */
        close(fd);
        fd = -1;
    }
    trial_finish(&t, log, code);
    CHECK(!sock_of(&t)->conns); /* it is of no use any more */
    if (fd >= 0) close(fd);
    t.no_clean = true;
    trial_end(&t);
    close(listener);
    free(text);
}

TEST(answer_before_the_request_is_sent)
{
    answer_early(SSE "\r\n" TWO FIN DONE, "start|Hel|lo||end", LLMCB_OK);
    answer_early(CLEAN_KEPT, "start|clean|end", LLMCB_OK);
    answer_early("HTTP/1.1 400 X\r\nContent-Length: 0\r\n\r\n",
                 "start|error:EHTTP", LLMCB_EHTTP);
}

TEST(reset_before_the_request_is_sent)
{
    answer_early(NULL, "start|error:EIO", LLMCB_EIO);
}

/* A failure that is neither ours nor the connection's end. */
TEST(requests_that_cannot_be_sent)
{
    static const int errors[] = { EHOSTUNREACH, ETIMEDOUT, ENETDOWN };
    size_t i;

    for (i = 0; i < 3; i++) {
        server_script s = script(CLEAN_KEPT, SERVER_KEEP);
        trial t;

        trial_begin(&t, SOCK, &s, 1);
        trial_open(&t);
        sys_plan(SYS_send, 1, false, errors[i]);
        trial_ask(&t);
        trial_finish(&t, "start|error:EIO", LLMCB_EIO);
        CHECK_INT(llmcb_op_error(t.op)->sys_errno, errors[i]);
        sys_calm();
        trial_end(&t);
    }
}

/* ---- reading ------------------------------------------------------------- */

/* A head that comes byte by byte is put together in memory. */
TEST(no_memory_for_a_head_in_pieces)
{
    long i;

    for (i = 1;; i++) {
        server_script s = script(CLEAN_KEPT, SERVER_KEEP);
        bool used;
        trial t;

        trial_begin(&t, SOCK, &s, 1);
        trial_open(&t);
        t.heap.fail_at = t.heap.calls + i;
        sys_plan(SYS_recv, 1, true, SYS_SHORT);
        trial_ask(&t);
        trial_wait(&t);
        used = t.heap.calls >= t.heap.fail_at;
        t.heap.fail_at = 0;
        sys_calm();
        trial_check(&t, NULL);
        if (llmcb_op_code(t.op) != LLMCB_OK)
            CHECK_STR(llmcb_code_name(llmcb_op_code(t.op)), "LLMCB_ENOMEM");
        trial_end(&t);
        if (!used) break;
        REQUIRE(i < 300);
    }
    CHECK(i > 5);
}

/* What comes behind [DONE] is read, so that the connection can be kept; but
 * not without end. */
static void linger(size_t more)
{
    size_t cap = more + 1000, head;
    size_t missing = more > LLMCBI_LINGER_BYTES; /* or it is over as it is */
    char *bytes = (char *)malloc(cap);
    server_segment hold;
    server_script s[2];
    trial t;

    if (!bytes) abort();
    head = (size_t)snprintf(bytes, cap, "%sContent-Length: %u\r\n\r\n%s", SSE,
                            (unsigned)(strlen(TWO FIN DONE) + more + missing),
                            TWO FIN DONE);
    memset(bytes + head, ':', more);
    hold.offset = head;
    hold.delay_ms = SERVER_HOLD;
    s[0] = script(bytes, SERVER_KEEP);
    s[0].len = head + more;
    s[0].segments = &hold;
    s[0].n_segments = 1;
    s[1] = script(CLEAN_KEPT, SERVER_KEEP);
    trial_begin(&t, SOCK, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    CHECK(sock_of(&t)->conns &&
          !LLMCBI_OWNER(llmcbi_conn, link, sock_of(&t)->conns)->x);
    sys.mono_ms -= 3600000; /* neither its time nor that of an idle one ends */
    server_go(t.server);
    while (sock_of(&t)->conns && !sock_of(&t)->n_idle && t.turns--)
        llmcb_loop_run_once(t.loop, 10);
    CHECK_INT(sock_of(&t)->n_idle, more <= LLMCBI_LINGER_BYTES);
    trial_clean(&t);
    CHECK_INT(server_connections(t.server), more > LLMCBI_LINGER_BYTES ? 2 : 1);
    t.no_clean = true;
    trial_end(&t);
    free(bytes);
}

TEST(rest_of_an_answer_is_read)
{
    linger(1);
    linger(LLMCBI_LINGER_BYTES);
}

TEST(long_rest_of_an_answer_is_left)
{
    linger(LLMCBI_LINGER_BYTES + 1);
}

/* ---- which connection ---------------------------------------------------- */

/* However busy it is, a connection is given up after a while. */
TEST(connections_grow_old)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    int64_t age;
    trial t;

    trial_begin(&t, SOCK, &s, 1);
    trial_open(&t);
    for (age = 0; age <= LLMCBI_LIFE_MS; age += LLMCBI_IDLE_MS / 2) {
        CHECK_INT(server_connections(t.server), age ? 1 : 0);
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        llmcb_op_free(t.op);
        t.op = NULL;
        pass_ms(&t, LLMCBI_IDLE_MS / 2);
    }
    trial_clean(&t);
    CHECK_INT(server_connections(t.server), 2);
    t.no_clean = true;
    trial_end(&t);
}

/* A transport of the program's that passes on other addresses: a connection
 * serves the one that it was made for. */
TEST(addresses_of_another_transport)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    server *second = server_start(&s, 1);
    bend b;
    trial t;
    int i;

    if (!second) abort();
    trial_shared = true;
    trial_begin(&t, SOCK, &s, 1);
    trial_open(&t);
    trial_bend(&t, &b);
    for (i = 0; i < 4; i++) {
        b.url = server_base(i % 2 ? second : t.server);
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        llmcb_op_free(t.op);
        t.op = NULL;
    }
    CHECK_INT(server_connections(t.server), 1);
    CHECK_INT(server_requests(t.server), 2);
    CHECK_INT(server_connections(second), 1);
    CHECK_INT(server_requests(second), 2);
    b.url = "http://:0/";
    trial_forget(&t);
    trial_ask(&t);
    trial_finish(&t, "start|error:EINVAL", LLMCB_EINVAL);
    t.no_clean = true;
    trial_end(&t);
    server_stop(second);
    trial_shared = false;
}

int main(int argc, char **argv)
{
    alarm(160); /* what hangs is killed */
    return test_main(argc, argv);
}
