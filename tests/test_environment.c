/* Sections A and G of the fault catalogue (rows 1 to 10 and 96 to 116): names
 * and connections, TLS, time, cancel, misuse, resources, signals, fork and
 * files. A test is named after its row. Rows 106 and 107 are in
 * test_syscalls.c, row 110 is in test_security.c.
 *
 * What is asserted after each is T1 to T9, in trial.h. Nothing here measures
 * time: the clock that the library sees is moved by hand. */
#include "trial.h"
#include <sys/wait.h>

/* ---- helpers ------------------------------------------------------------- */

/* A port at which nobody listens; with `deaf`, one that takes no more: its
 * queue is full and nobody accepts. */
typedef struct place {
    int fd, others[8], n, port;
    char base[64];
} place;

/* Fills the queue of those that wait to be accepted: nobody else is answered
 * any more. */
static void place_deafen(place *p)
{
    struct sockaddr_in a;
    int i;

    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)p->port);
    if (listen(p->fd, 0) != 0) abort();
    for (i = p->n = 0; i < 8; i++) {
        p->others[p->n] = socket(AF_INET, SOCK_STREAM, 0);
        fcntl(p->others[p->n], F_SETFL, O_NONBLOCK);
        if (connect(p->others[p->n++], (struct sockaddr *)&a, sizeof a) != 0 &&
            errno != EINPROGRESS)
            abort();
    }
}

static void place_open(place *p, bool deaf)
{
    struct sockaddr_in a;
    socklen_t len = sizeof a;

    memset(p, 0, sizeof *p);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    p->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(p->fd, (struct sockaddr *)&a, sizeof a) != 0 ||
        getsockname(p->fd, (struct sockaddr *)&a, &len) != 0)
        abort();
    p->port = ntohs(a.sin_port);
    snprintf(p->base, sizeof p->base, "http://127.0.0.1:%d/v1", p->port);
    if (deaf) place_deafen(p);
}

static void place_close(place *p)
{
    while (p->n)
        close(p->others[--p->n]);
    close(p->fd);
}

static int spawn_wait(pid_t pid)
{
    int status = -1;

    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Time passes once the first try has failed. */
static void pass_back_off(trial *t)
{
    trial_until(t, 2);
    if (t->transport != REPLAY) pass_ms(t, 10000);
}

/* ---- A: resolve, connect, TLS -------------------------------------------- */

TEST_ON_NET(fault_001_no_such_name)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    char base[64];
    trial t;

    trial_begin(&t, transport, &s, 1);
    snprintf(base, sizeof base, "%s", t.cd.base_url);
    t.cd.base_url = "http://no-such-host.invalid/v1";
    t.cd.allow_cleartext_key = true;
    t.cd.max_retries = 1;
    trial_open(&t);
    /* libcurl asks the system itself */
    sys_plan(SYS_getaddrinfo, 1, true, EAI_NONAME);
    trial_ask(&t);
    pass_back_off(&t);
    trial_finish(&t, "start|retry:1|error:EDNS", LLMCB_EDNS);
    CHECK_INT(llmcb_op_error(t.op)->attempt, 2);
    CHECK_INT(llmcb_op_error(t.op)->http_status, 0);
    sys_calm();
    trial_move(&t, base);
    trial_end(&t);
}

TEST_ON_ALL(fault_002_refused)
{
    server_script s[3] = { script("", SERVER_CLOSE), script("", SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    char base[64];
    place p;
    trial t;

    place_open(&p, false);
    if (transport == REPLAY)
        trial_begin(&t, transport, s, 3);
    else
        trial_begin(&t, transport, s + 2, 1);
    t.tapes[0].end = t.tapes[1].end = LLMCB_REPLAY_REFUSE;
    snprintf(base, sizeof base, "%s", t.cd.base_url);
    if (transport != REPLAY) t.cd.base_url = p.base;
    t.cd.max_retries = 1;
    trial_open(&t);
    trial_ask(&t);
    pass_back_off(&t);
    trial_finish(&t, "start|retry:1|error:ECONNECT", LLMCB_ECONNECT);
    if (transport != REPLAY)
        CHECK_INT(llmcb_op_error(t.op)->sys_errno, ECONNREFUSED);
    trial_move(&t, base);
    trial_end(&t);
    place_close(&p);
}

TEST_ON_NET(fault_003_no_answer_to_connect)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    char base[64];
    place p;
    trial t;
    int i;

    place_open(&p, true);
    trial_begin(&t, transport, &s, 1);
    snprintf(base, sizeof base, "%s", t.cd.base_url);
    t.cd.base_url = p.base;
    t.cd.connect_ms = 100000;
    trial_open(&t);
    trial_ask(&t);
    trial_until(&t, 1);
    for (i = 0; i < 5; i++)
        llmcb_loop_run_once(t.loop, 0);
    pass_ms(&t, 40000);
    CHECK(!llmcb_op_done(t.op));
    pass_ms(&t, 60001);
    trial_finish(&t, "start|error:ETIMEDOUT", LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_CONNECT);
    trial_move(&t, base);
    trial_end(&t);
    place_close(&p);
}

/* Reads a request of one segment while the loop turns. */
static bool place_read(llmcb_loop *loop, int fd)
{
    char bytes[65536];
    int i;

    for (i = 0; i < 5000; i++) {
        if (recv(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0) return true;
        llmcb_loop_run_once(loop, 1);
    }
    return false;
}

/* The same for the new connection that replaces a kept one: connect_ms holds
 * again. */
TEST_ON_NET(fault_003_no_answer_to_connect_again)
{
    static const char answer[] =
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        "Content-Length: 74\r\n\r\n{\"choices\":[{\"index\":0,\"message\":{"
        "\"content\":\"a\"},\"finish_reason\":\"stop\"}]}";
    static const struct linger at_once = { 1, 0 };
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_message question;
    llmcb_chat_desc d;
    llmcb_chat *chat;
    llmcb_op *op;
    int fd = -1, i;
    place p;

    place_open(&p, false);
    REQUIRE(listen(p.fd, 4) == 0 && fcntl(p.fd, F_SETFL, O_NONBLOCK) == 0);
    memset(&question, 0, sizeof question);
    question.content = "Tell me a joke";
    memset(&d, 0, sizeof d);
    d.base_url = p.base;
    d.api_key = "";
    d.transport = transport == CURL_T ? llmcb_curl_transport(loop)
                                    : llmcb_socket_transport(loop);
    d.max_retries = -1;
    d.connect_ms = 300;
    d.first_byte_ms = 3000;
    chat = llmcb_chat_new(loop, &d);
    op = llmcb_chat_generate(chat, &question, 1, NULL);
    for (i = 0; i < 5000 && fd < 0; i++) {
        llmcb_loop_run_once(loop, 1);
        fd = accept(p.fd, NULL, NULL);
    }
    REQUIRE(place_read(loop, fd));
    CHECK(send(fd, answer, sizeof answer - 1, 0) == sizeof answer - 1);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_free(op);
    op = llmcb_chat_generate(chat, &question, 1, NULL);
    REQUIRE(place_read(loop, fd));
    place_deafen(&p);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(fd);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(op)->detail, LLMCB_DETAIL_CONNECT);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    place_close(&p);
}

TEST(fault_004_second_address_sock)
{
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    place p, deaf;
    trial t;
    int how;

    for (how = 0; how < 2; how++) { /* the first refuses, or is silent */
        place_open(&p, false);
        place_open(&deaf, true);
        trial_begin(&t, SOCK, s, 2);
        sys_names_of.host = "two.invalid";
        sys_names_of.ports[0] = how ? deaf.port : p.port;
        sys_names_of.ports[1] = server_port(t.server);
        sys_names_of.n = 2;
        t.cd.base_url = "http://two.invalid/v1";
        t.cd.allow_cleartext_key = true;
        t.cd.connect_ms = 100000;
        trial_open(&t);
        trial_ask(&t);
        trial_until(&t, 1);
        if (how) {
            /* resolved, and connecting */
            while (!llmcb_op_done(t.op) && !sys.calls[SYS_connect])
                trial_turn(&t);
            pass_ms(&t, 50001); /* half of it is for each */
        }
        trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
        sys_names_of.ports[0] = server_port(t.server);
        trial_end(&t);
        sys_names_of.host = NULL;
        sys_plan(SYS_N, 0, false, 0);
        place_close(&deaf);
        place_close(&p);
    }
}

#ifndef LLMCB_NO_CURL
/* "localhost" has two addresses on most machines, and the server is at one. */
TEST(fault_004_second_address_curl)
{
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    char base[64];
    trial t;

    trial_begin(&t, CURL_T, s, 2);
    snprintf(base, sizeof base, "http://localhost:%d/v1",
             server_port(t.server));
    t.cd.base_url = base;
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    trial_end(&t);
}

/* -- TLS: `openssl s_server`, which prints what it is sent */

typedef struct tls {
    pid_t pid;
    int in, out, port;
    char pem[64], seen[8192];
    size_t len;
} tls;

static pid_t spawn(char *const *argv, int in, int out)
{
    pid_t pid = fork();

    if (pid == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(in >= 0 ? in : null, 0);
        dup2(out >= 0 ? out : null, 1);
        dup2(null, 2);
        execvp(argv[0], argv);
        _exit(127);
    }
    return pid;
}

/* A certificate that is its own authority, with its key in the same file. */
static bool make_certificate(const char *pem, const char *names, bool expired)
{
    char command[1024];
    char *argv[] = { (char *)"sh", (char *)"-c", command, NULL };

    /* `ca` because it is the one way to the past that all versions have */
    snprintf(command, sizeof command,
             "set -e; d=%s.d; rm -rf $d; mkdir $d; cd $d; : >i; echo 01 >s\n"
             "printf '[ca]\\ndefault_ca=a\\n[a]\\ndatabase=i\\nserial=s\\n"
             "new_certs_dir=.\\ndefault_md=sha256\\npolicy=p\\n[p]\\n"
             "commonName=supplied\\n[req]\\ndistinguished_name=n\\nprompt=no\\n"
             "[n]\\nCN=test\\n[x]\\nbasicConstraints=CA:TRUE\\n"
             "subjectAltName=%s\\n' >c\n"
             "openssl ecparam -name prime256v1 -genkey -noout -out k\n"
             "openssl req -new -config c -key k -out r\n"
             "openssl ca -batch -notext -selfsign -config c -extensions x"
             " -keyfile k %s -in r -out o\n"
             "cat o k >../../%s; cd ..; rm -rf ../$d",
             pem, names,
             expired ? "-startdate 20200101000000Z -enddate 20200201000000Z"
                     : "-days 2",
             pem);
    return spawn_wait(spawn(argv, -1, -1)) == 0;
}

static bool tls_open(tls *s, const char *names, bool expired)
{
    char *argv[] = {
        (char *)"openssl",     (char *)"s_server", (char *)"-accept",
        (char *)"127.0.0.1:0", (char *)"-cert",    s->pem,
        (char *)"-naccept",    (char *)"4",        NULL
    };
    int in[2], out[2]; /* it ends with its input */
    const char *at;

    memset(s, 0, sizeof *s);
    snprintf(s->pem, sizeof s->pem, "build/tls-%ld.pem", (long)getpid());
    mkdir("build", 0777);
    if (!make_certificate(s->pem, names, expired)) return false;
    if (pipe(in) != 0 || pipe(out) != 0) abort();
    fcntl(in[1], F_SETFD, FD_CLOEXEC);
    fcntl(out[0], F_SETFD, FD_CLOEXEC);
    s->pid = spawn(argv, in[0], out[1]);
    close(in[0]);
    close(out[1]);
    s->in = in[1];
    s->out = out[0];
    for (;;) {
        ssize_t n = read(s->out, s->seen + s->len, 256);
        if (n <= 0) return false;
        s->len += (size_t)n;
        at = strstr(s->seen, "ACCEPT 127.0.0.1:");
        if (at && strchr(at, '\n')) break;
    }
    s->port = atoi(at + strlen("ACCEPT 127.0.0.1:"));
    return s->port > 0;
}

/* What it has printed to its end. */
static void tls_close(tls *s)
{
    ssize_t n;

    if (s->pid > 0) kill(s->pid, SIGTERM);
    while (s->len < sizeof s->seen - 300 &&
           (n = read(s->out, s->seen + s->len, 256)) > 0)
        s->len += (size_t)n;
    close(s->in);
    close(s->out);
    if (s->pid > 0) spawn_wait(s->pid);
    unlink(s->pem);
}

static void bad_certificate(const char *names, bool expired, bool trusted,
                            llmcb_code want)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    char base[64], plain[64];
    tls server;
    trial t;

    if (!tls_open(&server, names, expired))
        SKIP("openssl is missing or too old");
    trial_begin(&t, CURL_T, &s, 1);
    snprintf(plain, sizeof plain, "%s", t.cd.base_url);
    snprintf(base, sizeof base, "https://127.0.0.1:%d/v1", server.port);
    t.cd.base_url = base;
    if (trusted) t.cd.ca_file = server.pem;
    t.cd.max_retries = 2;
    t.cd.idle_ms = t.cd.first_byte_ms = 1000;
    trial_open(&t);
    trial_ask(&t);
    if (want == LLMCB_ETLS) {
        trial_finish(&t, "start|error:ETLS", want);
    } else { /* the positive one: it was sent, and nobody answers */
        while (!llmcb_op_done(t.op) && !strstr(server.seen, "\r\n\r\n")) {
            struct pollfd fd = { server.out, POLLIN, 0 };
            llmcb_loop_run_once(t.loop, 10);
            while (poll(&fd, 1, 0) == 1) {
                ssize_t n = read(server.out, server.seen + server.len, 256);
                if (n <= 0) break;
                server.len += (size_t)n;
            }
        }
        llmcb_op_cancel(t.op);
        trial_finish(&t, "start|error:ECANCELLED", want);
    }
    trial_move(&t, plain);
    trial_end(&t);
    tls_close(&server);
    CHECK_INT(strstr(server.seen, "POST") != NULL, want != LLMCB_ETLS);
    CHECK_INT(has_canary(server.seen), want != LLMCB_ETLS);
}

/* Without it the three below could fail for another reason. */
TEST(fault_005_good_certificate_curl)
{
    bad_certificate("IP:127.0.0.1", false, true, LLMCB_ECANCELLED);
}

TEST(fault_005_self_signed_curl)
{
    bad_certificate("IP:127.0.0.1", false, false, LLMCB_ETLS);
}

TEST(fault_006_other_name_curl)
{
    bad_certificate("DNS:other.invalid", false, true, LLMCB_ETLS);
}

TEST(fault_007_expired_curl)
{
    bad_certificate("IP:127.0.0.1", true, true, LLMCB_ETLS);
}

/* A server that speaks no TLS, or not yet. */
static void no_tls(server_script bad, const char *log, llmcb_code code)
{
    server_script s[2] = { bad, script(CLEAN, SERVER_CLOSE) };
    char base[64], plain[64];
    trial t;

    s[0].at_accept = 1;
    trial_begin(&t, CURL_T, s, 2);
    snprintf(plain, sizeof plain, "%s", t.cd.base_url);
    snprintf(base, sizeof base, "https://127.0.0.1:%d/v1",
             server_port(t.server));
    t.cd.base_url = base;
    t.cd.connect_ms = 100000;
    trial_open(&t);
    trial_ask(&t);
    if (code == LLMCB_ETIMEDOUT) {
        while (!llmcb_op_done(t.op) && !server_connections(t.server))
            llmcb_loop_run_once(t.loop, 1);
        pass_ms(&t, 40000);
        CHECK(!llmcb_op_done(t.op));
        pass_ms(&t, 60001);
    }
    trial_finish(&t, log, code);
    if (code == LLMCB_ETIMEDOUT)
        CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_CONNECT);
    CHECK_INT(server_requests(t.server), 0);
    trial_move(&t, plain);
    trial_end(&t);
}

TEST(fault_008_handshake_stalls_curl)
{
    no_tls(script("", SERVER_STALL), "start|error:ETIMEDOUT", LLMCB_ETIMEDOUT);
}

TEST(fault_009_plain_http_on_tls_port_curl)
{
    no_tls(script("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
                  SERVER_CLOSE),
           "start|error:ETLS", LLMCB_ETLS);
}
#endif

/* Not retried: it would fail again, and the cause is here. */
TEST_ON_NET(fault_010_no_descriptor)
{
    static const int errors[] = { EMFILE, ENFILE, ENOBUFS, ENOMEM };
    server_script s = script(CLEAN, SERVER_CLOSE);
    size_t i;

    for (i = 0; i < 4; i++) {
        trial t;

        trial_begin(&t, transport, &s, 1);
        t.cd.max_retries = 2;
        trial_open(&t);
        sys_plan(SYS_socket, 1, true, errors[i]);
        trial_ask(&t);
        trial_finish(&t, "start|error:ESYS", LLMCB_ESYS);
        CHECK_INT(llmcb_op_error(t.op)->sys_errno, errors[i]);
        CHECK_INT(sys_struck(), 1);
        sys_calm();
        trial_end(&t);
    }
}

/* ---- G: time ------------------------------------------------------------- */

#define T1 EV("a")
static const char stalling[] = SSE "\r\n" EV("a") EV("b") EV("c") EV("d");

/* Each number of tokens, then silence. On the virtual clock the limit is hit
 * exactly; on the others it is crossed by hand. */
TEST_ON_ALL(fault_096_stall_after_tokens)
{
    static const char *const logs[] = { "start|error:ETIMEDOUT",
                                        "start|a|error:ETIMEDOUT",
                                        "start|a|b|error:ETIMEDOUT",
                                        "start|a|b|c|error:ETIMEDOUT",
                                        "start|a|b|c|d|error:ETIMEDOUT" };
    unsigned k;

    for (k = 0; k < 5; k++) {
        server_script s[2] = { script(stalling, SERVER_STALL),
                               script(CLEAN, SERVER_CLOSE) };
        trial t;

        /* 0: not even a head */
        s[0].len = k ? strlen(SSE "\r\n") + k * strlen(T1) : 0;
        if (!k) s[0].bytes = "";
        trial_begin(&t, transport, s, 2);
        t.tapes[0].len = s[0].len;
        t.cd.first_byte_ms = t.cd.idle_ms = 100000;
        trial_open(&t);
        trial_ask(&t);
        if (transport != REPLAY) {
            if (k) trial_until(&t, k + 1);
            while (!server_requests(t.server) && !llmcb_op_done(t.op))
                llmcb_loop_run_once(t.loop, 1);
            llmcb_loop_run_once(t.loop, 0);
            pass_ms(&t, 40000);
            CHECK(!llmcb_op_done(t.op));
            pass_ms(&t, 60001);
        }
        trial_finish(&t, logs[k], LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_op_error(t.op)->detail,
                  k ? LLMCB_DETAIL_IDLE : LLMCB_DETAIL_FIRST_BYTE);
        if (transport == REPLAY) CHECK_INT(llmcb_loop_now(t.loop), 100000);
        trial_end(&t);
    }
}

TEST_ON_ALL(fault_097_total)
{
    server_segment gaps[4];
    server_script s[2] = { script(stalling, SERVER_STALL),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;
    size_t i;

    for (i = 0; i < 4; i++) {
        gaps[i].offset = strlen(SSE "\r\n") + i * strlen(T1);
        gaps[i].delay_ms = transport == REPLAY ? 40000 : SERVER_HOLD;
    }
    s[0].segments = gaps;
    s[0].n_segments = 4;
    trial_begin(&t, transport, s, 2);
    t.cd.idle_ms = 50000; /* never reached */
    t.cd.total_ms = 100000;
    trial_open(&t);
    trial_ask(&t);
    if (transport != REPLAY) {
        /* the idle limit runs from the head on */
        while (server_wait_held(t.server, 0) && !server_requests(t.server))
            llmcb_loop_run_once(t.loop, 1);
        for (i = 0; i < 2; i++) {
            pass_ms(&t, 30000);
            CHECK(!llmcb_op_done(t.op));
            server_go(t.server);
            trial_until(&t, (unsigned)i + 2);
        }
        pass_ms(&t, 40001);
    }
    trial_finish(&t, "start|a|b|error:ETIMEDOUT", LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_TOTAL);
    if (transport == REPLAY) CHECK_INT(llmcb_loop_now(t.loop), 100000);
    trial_end(&t);
}

/* ---- G: cancel and misuse ------------------------------------------------ */

static void *cancel_thread(void *arg)
{
    llmcb_op_cancel((llmcb_op *)arg);
    return NULL;
}

static void cancel_by_thread(llmcb_op *op)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, cancel_thread, op) != 0) abort();
    pthread_join(thread, NULL);
}

/* After k events, by the loop's thread, twice, or by another. */
TEST_ON_ALL(fault_098_cancel_at_each_event)
{
    unsigned k;
    int how;

    for (k = 0; k <= 5; k++)
        for (how = 0; how < 3; how++) {
            server_script s[2] = { script(stalling, SERVER_STALL),
                                   script(CLEAN, SERVER_CLOSE) };
            int before = test_failures_here;
            trial t;

            s[0].len = strlen(SSE "\r\n") + (k > 1 ? k - 1 : 0) * strlen(T1);
            trial_begin(&t, transport, s, 2);
            t.unsure = k < 2;
            trial_open(&t);
            trial_ask(&t);
            if (k) trial_until(&t, k);
            if (how < 2) llmcb_op_cancel(t.op);
            if (how == 1) llmcb_op_cancel(t.op);
            if (how == 2) cancel_by_thread(t.op);
            trial_wait(&t);
            trial_check(&t, NULL);
            CHECK_INT(llmcb_op_code(t.op), LLMCB_ECANCELLED);
            CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_CALLER);
            /* what it had been told stands */
            CHECK(strncmp(t.r[0]->log, "start|a|b|c|d", k ? 3 + 2 * k : 0) ==
                  0);
            llmcb_op_cancel(t.op); /* late */
            llmcb_loop_run_once(t.loop, 0);
            trial_check(&t, NULL);
            if (t.server && k > 1)
                CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
            trial_end(&t);
            if (before != test_failures_here)
                TEST_FAIL("after %u events, way %d", k, how);
        }
}

typedef struct deed {
    trial *t;
    int in; /* the event in which it is done */
    int what;
    int done;
    llmcb_code said;
    llmcb_op *op;
} deed;

enum {
    CANCEL,
    FREE_OP,
    NEW_RUN,
    FREE_LOOP,
    RUN_LOOP,
    WAIT_OP,
    FREE_CHAT,
    N_DEEDS
};

static int act_deed(rec *r, const llmcb_event *ev)
{
    deed *d = (deed *)r->user;
    trial *t = d->t;

    if ((int)ev->kind != d->in || d->done++) return 0;
    switch (d->what) {
    case CANCEL: llmcb_op_cancel(t->op); break;
    case FREE_OP:
        llmcb_op_free(t->op);
        t->op = NULL;
        break;
    case NEW_RUN:
        d->op = llmcb_chat_generate(t->chat, &question, 1, NULL);
        break;
    case FREE_LOOP: d->said = llmcb_loop_free(t->loop); break;
    case RUN_LOOP: d->said = llmcb_loop_run_once(t->loop, 0); break;
    case WAIT_OP: d->said = llmcb_op_wait(t->op); break;
    case FREE_CHAT:
        llmcb_chat_free(t->chat);
        t->chat = NULL;
        break;
    default: break;
    }
    return 0;
}

/* What a handler may do to what it serves, in each event, on the loop. */
TEST_ON_ALL(fault_099_handler_meddles)
{
    static const llmcb_event_kind kinds[] = { LLMCB_CHAT_MODEL_START,
                                              LLMCB_LLM_NEW_TOKEN,
                                              LLMCB_LLM_END };
    int what, who;
    size_t k, i;

    for (what = 0; what < N_DEEDS; what++)
        for (k = 0; k < 3; k++)
            for (who = 0; who < 2; who++) {
                server_script s[2] = { script(HELLO, SERVER_CLOSE),
                                       script(CLEAN, SERVER_CLOSE) };
                int before = test_failures_here, n = 0;
                deed d;
                trial t;

                trial_begin(&t, transport, s, 2);
                t.unsure = what <= FREE_OP && k == 0;
                memset(&d, 0, sizeof d);
                d.t = &t;
                d.in = (int)kinds[k];
                d.what = what;
                d.said = LLMCB_ESTATE;
                t.r[who]->user = &d;
                t.r[who]->act = act_deed;
                trial_open(&t);
                trial_ask(&t);
                while ((!d.done || llmcb_loop_alive(t.loop)) && n++ < 5000)
                    trial_turn(&t);
                CHECK(n < 5000);
                CHECK_INT(d.said, LLMCB_ESTATE);
                for (i = 0; i < 3; i++) {
                    CHECK_REC(t.r[i]);
                    /* cancelled in the start: not all were told of it */
                    if (what > FREE_OP || k)
                        CHECK_INT(t.r[i]->finishes, what == NEW_RUN ? 2 : 1);
                    CHECK_INT(count_of(t.r[i]->log, "ECANCELLED"),
                              what <= FREE_OP && k < 2 && t.r[i]->starts);
                }
                if (t.op) CHECK(llmcb_op_done(t.op));
                if (what == NEW_RUN) CHECK_INT(llmcb_op_code(d.op), LLMCB_OK);
                llmcb_op_free(d.op);
                if (what == FREE_CHAT) t.chat = llmcb_chat_new(t.loop, &t.cd);
                trial_end(&t);
                if (before != test_failures_here)
                    TEST_FAIL("deed %d by %s in event %d", what,
                              who ? "A" : "I", d.in);
            }
}

static int act_fail(rec *r, const llmcb_event *ev)
{
    return r->user && (int)ev->kind == *(int *)r->user ? LLMCB_EIO : 0;
}

/* Without LLMCB_RAISE it is logged, and the run goes on. */
TEST_ON_ALL(fault_100_handler_fails)
{
    static int kinds[] = { LLMCB_CHAT_MODEL_START, LLMCB_LLM_NEW_TOKEN,
                           LLMCB_LLM_END };
    size_t i, k;
    int raise, who;

    for (raise = 0; raise < 2; raise++)
        for (who = 0; who < 3; who++)
            for (k = 0; k < 3; k++) {
                server_script s[2] = { script(HELLO, SERVER_CLOSE),
                                       script(CLEAN, SERVER_CLOSE) };
                int before = test_failures_here;
                trial t;

                trial_begin(&t, transport, s, 2);
                t.unsure = raise && !k; /* no request is sent */
                t.r[who]->act = act_fail;
                t.r[who]->user = &kinds[k];
                if (raise) t.r[who]->h.flags |= LLMCB_RAISE;
                trial_open(&t);
                trial_ask(&t);
                trial_wait(&t);
                for (i = 0; i < 3; i++) {
                    CHECK_REC(t.r[i]);
                    CHECK_INT(count_of(t.r[i]->log, "EHANDLER"),
                              raise && k < 2 && t.r[i]->starts);
                }
                CHECK_INT(llmcb_op_code(t.op),
                          raise ? LLMCB_EHANDLER : LLMCB_OK);
                if (raise)
                    CHECK_INT(llmcb_op_error(t.op)->handler_result, LLMCB_EIO);
                else
                    CHECK(strstr(t.log, t.r[who]->name));
                t.r[who]->user = NULL; /* well again */
                trial_end(&t);
                if (before != test_failures_here)
                    TEST_FAIL("raise %d, handler %d, event %d", raise, who,
                              kinds[k]);
            }
}

/* A blocked handler and 3,000 tokens: the transport is paused at the window,
 * nothing is lost, and memory does not grow with what is to come. */
TEST_ON_ALL(fault_101_slow_handler)
{
    enum { N = 3000, WINDOW = 64 };
    static gate g;
    const gate fresh = GATE;
    server_script s[2] = { script(NULL, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    char *bytes = (char *)malloc(N * 80 + 400), *at = bytes;
    size_t held;
    unsigned seen;
    trial t;
    int i;

    if (!bytes) abort();
    at += sprintf(at, "%s", SSE "Connection: close\r\n\r\n");
    for (i = 0; i < N; i++)
        at += sprintf(at, "%s", EV("x"));
    sprintf(at, "%s", FIN DONE);
    s[0].bytes = bytes;
    g = fresh;
    trial_begin(&t, transport, s, 2);
    t.cd.limits.window_events = WINDOW;
    t.r[2]->gate = &g;
    t.r[2]->gate_kind = LLMCB_LLM_NEW_TOKEN;
    t.turns = 100000;
    trial_open(&t);
    trial_ask(&t);
    for (i = 0; i < 100000 && t.r[0]->events < WINDOW; i++)
        llmcb_loop_run_once(t.loop, 1);
    gate_wait(&g, 1);
    for (i = 0; i < 50; i++)
        llmcb_loop_run_once(t.loop, 0);
    seen = t.r[0]->events;
    held = t.heap.bytes;
    for (i = 0; i < 200; i++)
        llmcb_loop_run_once(t.loop, 0);
    CHECK_INT(t.r[0]->events, seen);
    CHECK_INT(t.heap.bytes, held);
    CHECK(seen <= WINDOW + 8);
    gate_let(&g, EVERYBODY);
    trial_finish(&t, NULL, LLMCB_OK);
    for (i = 0; i < 3; i++)
        CHECK_INT(count_of(t.r[i]->log, "|x"), N);
    /* one read of a transport, and the window */
    CHECK(t.heap.peak < 1024 * 1024);
    t.r[2]->gate = NULL;
    trial_end(&t);
    free(bytes);
}

/* In a process of its own, which is left without joining anybody. */
static int never_returns(void)
{
    static gate g = GATE;
    server_script s = script(HELLO, SERVER_CLOSE);
    int bits = 0, turns = 0;
    trial t;

    alarm(60);
    trial_begin(&t, REPLAY, &s, 1);
    t.ld.shutdown_ms = 20;
    t.r[2]->gate = &g;
    t.r[2]->gate_kind = LLMCB_LLM_NEW_TOKEN;
    if (!trial_open(&t)) return 1;
    trial_ask(&t);
    while (!gate_came(&g) && turns++ < 100000)
        llmcb_loop_run_once(t.loop, 1);
    if (!gate_came(&g)) bits |= 2;
    llmcb_op_free(t.op);
    llmcb_chat_free(t.chat);
    if (llmcb_loop_free(t.loop) != LLMCB_ETIMEDOUT) bits |= 4;
    /* it may still come back; the others were told the end all the same */
    gate_let(&g, EVERYBODY);
    if (t.r[0]->wrong || t.r[1]->wrong) bits |= 8;
    pthread_mutex_lock(&t.r[2]->m);
    if (t.r[2]->finishes > 1) bits |= 16;
    pthread_mutex_unlock(&t.r[2]->m);
    if (has_canary(t.log)) bits |= 32;
    return bits;
}

static llmcb_step sleeps_for_ever(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    *(llmcb_code *)t->self = t->result;
    LLMCB_END(t);
}

/* The machine stands still for longer than shutdown_ms right after all was
 * cancelled: what needs no waiting for ends, and the loop is freed. */
TEST(free_is_late_and_nothing_is_stuck)
{
    llmcb_loop_desc ld;
    llmcb_loop *loop;
    llmcb_code told = LLMCB_OK;

    memset(&ld, 0, sizeof ld);
    ld.shutdown_ms = 1;
    loop = llmcb_loop_new(&ld);
    REQUIRE(loop != NULL);
    REQUIRE(llmcb_task_start(loop, sleeps_for_ever, 0, &told) != NULL);
    llmcb_loop_run_once(loop, 0);
    sys.step_ms = 10000;
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    sys.step_ms = sys.mono_ms = 0;
    CHECK_INT(told, LLMCB_ECANCELLED);
}

TEST(fault_102_handler_never_returns)
{
    int status = -1;
    pid_t pid = fork();

    REQUIRE(pid >= 0);
    if (pid == 0) test_exit(never_returns());
    status = spawn_wait(pid);
    CHECK_INT(status, 0);
}

static llmcb_step pending(llmcb_task *t, llmcb_handler *h,
                          const llmcb_event *ev)
{
    (void)h;
    (void)ev;
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    LLMCB_END(t);
}

TEST_ON_ALL(fault_103_handler_pends)
{
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    bool done = false;
    trial t;

    trial_begin(&t, transport, s, 2);
    t.cd.handler_ms = 100000;
    t.r[1]->h.async.on_llm_new_token = pending;
    trial_open(&t);
    trial_ask(&t);
    trial_until_one(&t, 4); /* all tokens are there, and wait for it */
    while (transport != REPLAY && !done) { /* the worker is not late */
        pthread_mutex_lock(&t.r[2]->m);
        done = t.r[2]->done == 4;
        pthread_mutex_unlock(&t.r[2]->m);
        if (!done) llmcb_loop_run_once(t.loop, 1);
    }
    llmcb_loop_run_once(t.loop, 0);
    if (transport != REPLAY) {
        pass_ms(&t, 40000);
        CHECK(!llmcb_op_done(t.op));
        pass_ms(&t, 60001);
    }
    trial_wait(&t);
    CHECK_INT(llmcb_op_code(t.op), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_HANDLER);
    CHECK_STR(t.r[0]->log, "start|Hel|lo||error:ETIMEDOUT");
    CHECK_STR(t.r[2]->log, t.r[0]->log);
    CHECK_INT(t.r[1]->finishes, 0); /* given up: it gets nothing more */
    t.r[1]->h.async.on_llm_new_token = rec_async;
    trial_end(&t);
}

/* ---- G: resources -------------------------------------------------------- */

TEST_ON_ALL(fault_104_no_thread)
{
    long at;

    for (at = 1; at <= 3; at++) {
        server_script s[2] = { script(HELLO, SERVER_CLOSE),
                               script(CLEAN, SERVER_CLOSE) };
        trial t;

        trial_begin(&t, transport, at == 1 ? s + 1 : s, at == 1 ? 1 : 2);
        t.ld.workers = 3;
        trial_open(&t);
        sys_plan(SYS_pthread_create, at, true, EAGAIN);
        trial_ask(&t);
        if (at == 1) { /* before any start event */
            trial_finish(&t, "", LLMCB_ESYS);
            CHECK_INT(llmcb_op_error(t.op)->sys_errno, EAGAIN);
        } else {
            trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
        }
        CHECK_INT(sys.threads - t.own_threads, at - 1);
        sys_calm();
        trial_end(&t);
    }
}

static int no_use(llmcb_tool_use *use)
{
    (void)use;
    return 0;
}

static int no_chain(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    (void)ev;
    return 0;
}

static int idle_job(void *arg)
{
    (void)arg;
    return 0;
}

/* Whatever needed the thread says why there is none. */
TEST(fault_104_no_thread_for_anything)
{
    static const char *const names[] = { "call", "job", "run", "agent",
                                         "tool" };
    server_script s = script(CLEAN, SERVER_CLOSE);
    llmcb_handler sync, *list[1] = { &sync };
    llmcb_config config;
    llmcb_agent_desc agent;
    llmcb_tool tool;
    llmcb_tool_call use;
    size_t i;

    memset(&sync, 0, sizeof sync);
    sync.sync.on_chain_start = sync.sync.on_chat_model_start = no_chain;
    memset(&config, 0, sizeof config);
    memset(&agent, 0, sizeof agent);
    memset(&tool, 0, sizeof tool);
    memset(&use, 0, sizeof use);
    config.callbacks = list;
    tool.name = "t";
    tool.call = no_use;
    use.arguments = llmcb_text("{}");
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        trial t;

        trial_begin(&t, REPLAY, &s, 1);
        t.cd.n_callbacks = 0;
        trial_open(&t);
        config.n_callbacks = i != 4;
        agent.chat = t.chat;
        sys_plan(SYS_pthread_create, 1, true, EAGAIN);
        switch (i) {
        case 0:
            t.op = llmcb_chat_generate(t.chat, &question, 1, &config);
            break;
        case 1: t.op = llmcb_offload(t.loop, idle_job, NULL); break;
        case 2: t.op = llmcb_run_start(t.loop, NULL, &config); break;
        case 3:
            t.op = llmcb_agent_start(&agent, &question, 1, &config);
            break;
        default: t.op = llmcb_tool_start(t.loop, &tool, &use, &config);
        }
        trial_wait(&t);
        if (llmcb_op_code(t.op) != LLMCB_ESYS ||
            llmcb_op_error(t.op)->sys_errno != EAGAIN)
            TEST_FAIL("%s: %s, sys_errno %d", names[i],
                      llmcb_code_name(llmcb_op_code(t.op)),
                      llmcb_op_error(t.op)->sys_errno);
        sys_calm();
        llmcb_op_free(t.op);
        t.op = NULL;
        t.no_clean = true;
        trial_end(&t);
    }
}

/* Of our own allocations; what libcurl allocates itself is in
 * test_syscalls.c. */
TEST_ON_ALL(fault_105_no_memory)
{
    int ever;
    long i;

    for (ever = 0; ever < 2; ever++)
        for (i = 1;; i++) {
            server_script s[2] = { script(HELLO, SERVER_CLOSE),
                                   script(CLEAN_KEPT, SERVER_KEEP) };
            int before = test_failures_here;
            bool used, no_tape;
            trial t;

            trial_begin(&t, transport, s, 2);
            t.heap.fail_at = i;
            t.heap.for_ever = ever != 0;
            trial_open(&t);
            no_tape = transport == REPLAY && t.heap.calls >= i;
            trial_ask(&t);
            trial_wait(&t);
            used = t.heap.calls >= i;
            t.heap.fail_at = 0;
            trial_check(&t, NULL);
            if (llmcb_op_code(t.op) != LLMCB_OK)
                CHECK_STR(llmcb_code_name(llmcb_op_code(t.op)), "LLMCB_ENOMEM");
            if (!used) CHECK_STR(t.r[2]->log, "start|Hel|lo||end");
            /* whether the first answer was used up, only the server knows */
            llmcb_op_free(t.op);
            t.op = NULL;
            if (t.chat) {
                trial_forget(&t);
                trial_ask(&t);
                trial_finish(&t, NULL, no_tape ? LLMCB_ENOMEM : LLMCB_OK);
            }
            t.no_clean = true;
            trial_end(&t);
            if (before != test_failures_here) {
                TEST_FAIL("allocation %ld, %s", i,
                          ever ? "and all after it" : "once");
                return;
            }
            if (!used) break;
            REQUIRE(i < 500);
        }
}

/* Timers share one block, which grows with their number: whichever of a call's
 * it is that finds no room, the call says so, and the next has it. */
static bool timers_fail;
static int timers_failed;

typedef struct armed { /* as the block holds one */
    int64_t due;
    uint64_t seq;
    void *timer;
} armed;

static void *resize_but_timers(void *user, void *ptr, size_t old, size_t size)
{
    if (timers_fail && old == 16 * sizeof(armed) &&
        size == 40 * sizeof(armed)) {
        timers_failed++;
        return NULL;
    }
    return heap_resize(user, ptr, old, size);
}

static llmcb_step sleeps_long(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000000));
    LLMCB_END(t);
}

TEST_ON_ALL(fault_105_no_memory_for_timers)
{
    int n, i, struck = 0;

    for (n = 0; n < 16; n++) { /* that are there before */
        server_script s = script(CLEAN_KEPT, SERVER_KEEP);
        llmcb_op *sleepers[16];
        trial t;

        trial_begin(&t, transport, &s, 1);
        t.ld.allocator.resize = resize_but_timers;
        t.cd.handler_ms = 1000000;
        t.loop = llmcb_loop_new(&t.ld);
        for (i = 0; i < n; i++)
            sleepers[i] = llmcb_task_start(t.loop, sleeps_long, 0, NULL);
        timers_fail = true;
        timers_failed = 0;
        t.cd.transport = t.tr = trial_transport(&t);
        if (t.tr) t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_ask(&t);
        trial_wait(&t);
        trial_check(&t, NULL);
        CHECK_INT(llmcb_op_code(t.op),
                  timers_failed ? LLMCB_ENOMEM : LLMCB_OK);
        struck += timers_failed > 0;
        timers_fail = false;
        llmcb_op_free(t.op);
        t.op = NULL;
        if (!t.tr) {
            t.cd.transport = t.tr = trial_transport(&t);
            t.chat = llmcb_chat_new(t.loop, &t.cd);
        }
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        for (i = 0; i < n; i++) llmcb_op_free(sleepers[i]);
        t.no_clean = true;
        trial_end(&t);
    }
    CHECK(struck > 2);
    CHECK(struck < 16);
}

/* ---- G: signals, clocks, fork, files ------------------------------------- */

static volatile sig_atomic_t n_usr1, n_pipe;

static void on_usr1(int sig)
{
    (void)sig;
    n_usr1++;
}

static void on_pipe(int sig)
{
    (void)sig;
    n_pipe++;
}

typedef struct storm {
    pthread_t target, thread;
    pthread_mutex_t m;
    bool stop;
} storm;

static void *storm_main(void *arg)
{
    storm *s = (storm *)arg;
    bool stop;

    do {
        pthread_kill(s->target, SIGUSR1);
        pthread_kill(s->target, SIGCHLD);
        pthread_mutex_lock(&s->m);
        stop = s->stop;
        pthread_mutex_unlock(&s->m);
    } while (!stop);
    return NULL;
}

/* Signals interrupt every call that can be; the others' death is no signal. */
TEST_ON_ALL(fault_108_signals)
{
    const server_segment hold = { 0, SERVER_HOLD };
    server_script s[4] = { script(HELLO, SERVER_CLOSE), script("", SERVER_RST),
                           script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    struct sigaction usr1, piped, old_usr1, old_piped, after;
    llmcb_message big = question;
    char *text = (char *)malloc(4000001);
    storm st;
    trial t;
    int i;

    if (!text) abort();
    memset(text, 'p', 4000000);
    text[4000000] = '\0';
    memset(&usr1, 0, sizeof usr1);
    memset(&piped, 0, sizeof piped);
    usr1.sa_handler = on_usr1; /* without SA_RESTART */
    piped.sa_handler = on_pipe;
    sigaction(SIGUSR1, &usr1, &old_usr1);
    sigaction(SIGPIPE, &piped, &old_piped);
    n_usr1 = n_pipe = 0;
    if (transport != REPLAY) {
        s[1].at_accept = 1;
        s[1].segments = &hold;
        s[1].n_segments = 1;
    }
    trial_begin(&t, transport, s, 4);
    memset(&st, 0, sizeof st);
    pthread_mutex_init(&st.m, NULL);
    st.target = pthread_self();
    trial_open(&t);
    if (pthread_create(&st.thread, NULL, storm_main, &st) != 0) abort();
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    llmcb_op_free(t.op);
    trial_forget(&t);
    /* 4 MB to one that resets the connection */
    big.content = text;
    t.op = llmcb_chat_generate(t.chat, &big, 1, NULL);
    while (t.server && server_connections(t.server) < 2)
        llmcb_loop_run_once(t.loop, 1);
    for (i = 0; i < 3; i++)
        llmcb_loop_run_once(t.loop, 0);
    if (t.server) server_go(t.server);
    trial_finish(&t, "start|error:EIO", LLMCB_EIO);
    llmcb_op_free(t.op);
    trial_forget(&t);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    pthread_mutex_lock(&st.m);
    st.stop = true;
    pthread_mutex_unlock(&st.m);
    pthread_join(st.thread, NULL);
    CHECK(n_usr1 > 0);
    CHECK_INT(n_pipe, 0);
    sigaction(SIGPIPE, NULL, &after);
    CHECK(after.sa_handler == on_pipe); /* ours, as it was */
    trial_end(&t);
    sigaction(SIGUSR1, &old_usr1, NULL);
    sigaction(SIGPIPE, &old_piped, NULL);
    pthread_mutex_destroy(&st.m);
    free(text);
}

TEST_ON_ALL(fault_109_wall_clock_jumps)
{
    server_segment gaps[3];
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    /* the second is forward, while a limit is running */
    int64_t jumps[] = { -86400 * 365, 86400 * 366, -86400 };
    trial t;
    size_t i;

    for (i = 0; i < 3; i++) {
        gaps[i].offset =
            strlen(SSE "Connection: close\r\n\r\n") + i * strlen(EV("Hel"));
        gaps[i].delay_ms = transport == REPLAY ? 1000 : SERVER_HOLD;
    }
    gaps[2].offset -= 1; /* "lo" is shorter */
    s[0].segments = gaps;
    s[0].n_segments = 3;
    trial_begin(&t, transport, s, 2);
    t.cd.idle_ms = t.cd.first_byte_ms = t.cd.connect_ms = 20000;
    t.cd.total_ms = 60000;
    trial_open(&t);
    trial_ask(&t);
    for (i = 0; i < 3; i++) {
        sys.wall_s += jumps[i];
        llmcb_loop_run_once(t.loop, 0);
        CHECK(!llmcb_op_done(t.op) || transport == REPLAY);
        if (transport != REPLAY) server_go(t.server);
        trial_until(&t, (unsigned)(i < 2 ? i + 2 : 5));
    }
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    sys.wall_s = 0;
    trial_end(&t);
}

static void no_post(void *arg)
{
    (void)arg;
}

static int no_job(void *arg)
{
    (void)arg;
    return 0;
}

static llmcb_step no_step(llmcb_task *t)
{
    (void)t;
    return LLMCB_DONE;
}

/* All that can be called, in the child. A bit for each that is wrong. */
static int forked(trial *t)
{
    llmcb_str text = { "x", 1 };
    llmcb_op *op;
    unsigned events = t->r[0]->events;
    int bits = 0, before = open_fds(), i;

    alarm(30);
    if (llmcb_loop_run(t->loop) != LLMCB_EFORK ||
        llmcb_loop_run_once(t->loop, 0) != LLMCB_EFORK ||
        llmcb_loop_run_until(t->loop, t->op) != LLMCB_EFORK ||
        llmcb_loop_prepare(t->loop, NULL) != LLMCB_EFORK ||
        llmcb_loop_dispatch(t->loop, NULL, 0) != LLMCB_EFORK)
        bits |= 1;
    if (llmcb_op_wait(t->op) != LLMCB_EFORK) bits |= 2;
    if (llmcb_loop_post(t->loop, no_post, NULL) != LLMCB_EFORK) bits |= 4;
    if (llmcb_task_start(t->loop, no_step, 0, NULL) ||
        llmcb_offload(t->loop, no_job, NULL) || llmcb_socket_transport(t->loop))
        bits |= 8;
    op = llmcb_chat_generate(t->chat, &question, 1, NULL);
    if (op && llmcb_op_wait(op) != LLMCB_EFORK) bits |= 16;
    if (llmcb_run_text(llmcb_op_run_at(t->op, 0), text) != LLMCB_EFORK)
        bits |= 32;
    llmcb_loop_wakeup(t->loop);
    llmcb_op_cancel(t->op);
    llmcb_op_free(t->op);
    llmcb_chat_free(t->chat);
    if (llmcb_loop_free(t->loop) != LLMCB_EFORK) bits |= 64;
    for (i = 0; i < 3; i++)
        if (t->r[i]->events > events) bits |= 128;
    (void)before;
    return bits;
}

TEST_ON_ALL(fault_111_fork_while_streaming)
{
    server_segment hold;
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;
    int how;

    for (how = 0; how < 2; how++) { /* the child calls us, or just ends */
        pid_t pid;

        hold.offset = strlen(SSE "Connection: close\r\n\r\n" EV("Hel"));
        hold.delay_ms = transport == REPLAY ? 1000 : SERVER_HOLD;
        s[0].segments = &hold;
        s[0].n_segments = 1;
        trial_begin(&t, transport, s, 2);
        trial_open(&t);
        trial_ask(&t);
        trial_until(&t, 2);
        pid = fork();
        REQUIRE(pid >= 0);
        if (pid == 0) test_exit(how ? 0 : forked(&t));
        CHECK_INT(spawn_wait(pid), 0);
        /* no byte, no end of file: the server has seen one request */
        if (t.server) {
            CHECK_INT(server_requests(t.server), 1);
            CHECK_INT(server_is_closed(t.server, 0), SERVER_OPEN);
            server_go(t.server);
        }
        trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
        trial_end(&t);
    }
}

/* A child that lives on must not keep the parent's connections open: a
 * server learns of a cancel only when the last descriptor is closed. */
TEST_ON_NET(fault_111_child_frees_and_lives_on)
{
    server_script s[2] = { script(stalling, SERVER_STALL),
                           script(CLEAN, SERVER_CLOSE) };
    int go[2], said[2];
    char byte = 0;
    pid_t pid;
    trial t;

    if (pipe(go) != 0 || pipe(said) != 0) abort();
    trial_begin(&t, transport, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_until(&t, 5);
    pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        alarm(60);
        close(go[1]);
        llmcb_loop_free(t.loop);
        if (write(said[1], "f", 1) != 1) _exit(1);
        if (read(go[0], &byte, 1) < 0) _exit(2);
        test_exit(0);
    }
    CHECK(read(said[0], &byte, 1) == 1);
    llmcb_op_cancel(t.op);
    trial_finish(&t, NULL, LLMCB_ECANCELLED);
    CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
    close(go[0]);
    close(go[1]);
    close(said[0]);
    close(said[1]);
    CHECK_INT(spawn_wait(pid), 0);
    t.fds -= 4;
    trial_end(&t);
}

/* -- recordings as the trace of a run: where they cannot be written */

static char scratch[64];

static const char *scratch_path(const char *name)
{
    static char path[128];

    snprintf(path, sizeof path, "%s/%s", scratch, name);
    return path;
}

enum {
    SYMLINK,
    FIFO,
    DIRECTORY,
    MISSING,
    READ_ONLY,
    NO_SPACE,
    BAD_CLOSE,
    N_BAD_FILES
};

static void make_bad_file(int what)
{
    switch (what) {
    case SYMLINK:
        if (symlink("victim", scratch_path("x.http")) != 0) abort();
        break;
    case FIFO:
        if (mkfifo(scratch_path("x.http"), 0600) != 0) abort();
        break;
    case DIRECTORY:
        if (mkdir(scratch_path("x.http"), 0700) != 0) abort();
        break;
    case READ_ONLY: {
        int fd = open(scratch_path("x.http"), O_CREAT | O_WRONLY, 0400);
        if (fd < 0) abort();
        close(fd);
        break;
    }
    case NO_SPACE: sys_plan(SYS_write_file, 1, true, ENOSPC); break;
    case BAD_CLOSE: sys_plan(SYS_close, 1, true, EIO); break;
    default: break;
    }
}

/* The run does not suffer, and each response that was lost is told once. */
TEST(fault_112_bad_files_replay)
{
    int what;

    for (what = 0; what < N_BAD_FILES; what++) {
        server_script s[2] = { script(HELLO, SERVER_CLOSE),
                               script(CLEAN, SERVER_CLOSE) };
        int before = test_failures_here;
        struct stat st;
        trial t;

        if (what == READ_ONLY && geteuid() == 0) continue; /* may all */
        strcpy(scratch, "build/tmp-XXXXXX");
        mkdir("build", 0777);
        if (!mkdtemp(scratch)) abort();
        trial_begin(&t, REPLAY, s, 2);
        trial_open(&t);
        llmcb_chat_free(t.chat);
        t.cd.transport = llmcb_record_new(
            t.loop, t.tr,
            scratch_path(what == MISSING ? "no/x.http" : "x.http"));
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        make_bad_file(what);
        trial_ask(&t);
        trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
        sys_calm();
        CHECK_INT(count_of(t.log, "\n"), 1);
        CHECK(strstr(t.log, "recording"));
        CHECK_INT(sys.blocking_opens, 0);
        CHECK(stat(scratch_path("victim"), &st) != 0);
        trial_end(&t);
        unlink(scratch_path("x.http"));
        rmdir(scratch_path("x.http"));
        unlink(scratch_path("x.segments.json"));
        unlink(scratch_path("x-2.http"));
        unlink(scratch_path("x-2.segments.json"));
        CHECK_INT(rmdir(scratch), 0);
        if (before != test_failures_here) TEST_FAIL("bad file %d", what);
    }
}

/* What a tape may be that is to be played. */
TEST(fault_112_bad_tapes_replay)
{
    int what;

    for (what = 0; what <= MISSING; what++) {
        server_script s = script(CLEAN, SERVER_CLOSE);
        llmcb_replay_desc d;
        trial t;

        strcpy(scratch, "build/tmp-XXXXXX");
        mkdir("build", 0777);
        if (!mkdtemp(scratch)) abort();
        make_bad_file(what);
        trial_begin(&t, REPLAY, &s, 1);
        trial_open(&t);
        llmcb_chat_free(t.chat);
        memset(&d, 0, sizeof d);
        d.path = scratch_path("x.http");
        t.cd.transport = llmcb_replay_new(t.loop, &d);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_ask(&t);
        trial_finish(&t, "start|error:ESYS", LLMCB_ESYS);
        CHECK(strstr(llmcb_op_error(t.op)->message, "x.http"));
        CHECK_INT(sys.blocking_opens, 0);
        llmcb_chat_free(t.chat);
        t.cd.transport = t.tr;
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_end(&t);
        unlink(scratch_path("x.http"));
        rmdir(scratch_path("x.http"));
        CHECK_INT(rmdir(scratch), 0);
    }
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    if (!f || fputs(text, f) < 0 || fclose(f) != 0) abort();
}

/* A tape whose borders make no sense is played all the same, at once, as if
 * it had none; one that has them takes its time. */
TEST(fault_112_bad_borders_replay)
{
    static const char *const good =
        "{\"x\":[1,{}],\"segments\":[[0,0],[90,7],[95,8]],\"end\":\"keep\"}";
    static const char *const bad[] = {
        "", "x", "[]", "{", "{\"segments\":7}", "{\"segments\":[]}",
        "{\"segments\":[7]}", "{\"segments\":[[]]}", "{\"segments\":[[90]]}",
        "{\"segments\":[[90,7,1]]}", "{\"segments\":[[\"90\",7]]}",
        "{\"segments\":[[90,\"7\"]]}", "{\"segments\":[[90,-7]]}",
        "{\"segments\":[[-90,7]]}", "{\"segments\":[[90.5,7]]}",
        "{\"end\":7,\"segments\":[[90,7]]}",
        "{\"segments\":[[99999999999999999999,7]]}"
    };
    size_t i;

    for (i = 0; i <= sizeof bad / sizeof *bad; i++) {
        bool is_good = i == sizeof bad / sizeof *bad;
        server_script s = script(CLEAN, SERVER_CLOSE);
        char file[64], borders[64];
        llmcb_replay_desc d;
        trial t;

        strcpy(scratch, "build/tmp-XXXXXX");
        mkdir("build", 0777);
        if (!mkdtemp(scratch)) abort();
        strcpy(file, scratch_path("x.http"));
        strcpy(borders, scratch_path("x.segments.json"));
        write_file(file, CLEAN);
        write_file(borders, is_good ? good : bad[i]);
        trial_begin(&t, REPLAY, &s, 1);
        trial_open(&t);
        llmcb_chat_free(t.chat);
        memset(&d, 0, sizeof d);
        d.path = scratch_path(i % 2 ? "x" : "x.http"); /* it is the same */
        t.cd.transport = llmcb_replay_new(t.loop, &d);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        CHECK_INT(llmcb_loop_now(t.loop), is_good ? 15 : 0);
        if (llmcb_loop_now(t.loop) != (is_good ? 15 : 0))
            TEST_FAIL("%s", is_good ? good : bad[i]);
        trial_end(&t);
        unlink(file);
        unlink(borders);
        CHECK_INT(rmdir(scratch), 0);
    }
}

/* ... nor does it hide the tapes behind it; and it is said, once. */
TEST(bad_borders_of_the_first_of_two_tapes_replay)
{
    static const char *const names[] = { "x.http", "x-2.http",
                                         "x.segments.json" };
    static const char *const texts[] = { HELLO, CLEAN, "garbage" };
    server_script s = script(CLEAN, SERVER_CLOSE);
    llmcb_replay_desc d;
    trial t;
    int i;

    strcpy(scratch, "build/tmp-XXXXXX");
    mkdir("build", 0777);
    if (!mkdtemp(scratch)) abort();
    for (i = 0; i < 3; i++) write_file(scratch_path(names[i]), texts[i]);
    trial_begin(&t, REPLAY, &s, 1);
    trial_open(&t);
    llmcb_chat_free(t.chat);
    memset(&d, 0, sizeof d);
    d.path = scratch_path("x.http");
    t.cd.transport = llmcb_replay_new(t.loop, &d);
    t.chat = llmcb_chat_new(t.loop, &t.cd);
    for (i = 0; i < 2; i++) {
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, i ? "start|clean|end" : "start|Hel|lo||end",
                     LLMCB_OK);
        llmcb_op_free(t.op);
        t.op = NULL;
    }
    CHECK_INT(count_of(t.log, "\n"), 1);
    CHECK(strstr(t.log, ".segments.json"));
    t.no_clean = true;
    trial_end(&t);
    for (i = 0; i < 3; i++) unlink(scratch_path(names[i]));
    CHECK_INT(rmdir(scratch), 0);
}

/* A recorder holds back what its transport must hold back, and writes all. */
TEST(recorded_while_a_handler_is_slow_replay)
{
    server_script s = script(SSE "\r\n" EV("a") EV("b") EV("c") EV("d") FIN DONE,
                             SERVER_CLOSE);
    server_segment more = { strlen(SSE "\r\n" EV("a") EV("b") EV("c")), 2 };
    llmcb_replay_desc d;
    char file[64];
    trial t;
    int i;

    s.segments = &more;
    s.n_segments = 1;
    strcpy(scratch, "build/tmp-XXXXXX");
    mkdir("build", 0777);
    if (!mkdtemp(scratch)) abort();
    strcpy(file, scratch_path("x.http"));
    trial_begin(&t, REPLAY, &s, 1);
    t.cd.limits.window_events = 1;
    t.r[1]->ms = 5;
    trial_open(&t);
    CHECK(llmcb_record_new(t.loop, NULL, file) == NULL);
    CHECK(llmcb_record_new(t.loop, t.tr, NULL) == NULL);
    CHECK(llmcb_record_new(NULL, t.tr, file) == NULL);
    CHECK(llmcb_replay_new(t.loop, NULL) == NULL);
    memset(&d, 0, sizeof d);
    d.path = file;
    for (i = 0; i < 2; i++) {
        llmcb_chat_free(t.chat);
        t.cd.transport = i ? llmcb_replay_new(t.loop, &d)
                           : llmcb_record_new(t.loop, t.tr, file);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, "start|a|b|c|d||end", LLMCB_OK);
        llmcb_op_free(t.op);
        t.op = NULL;
    }
    t.no_clean = true;
    trial_end(&t);
    unlink(file);
    unlink(scratch_path("x.segments.json"));
    CHECK_INT(rmdir(scratch), 0);
}

/* A recording has prompts in it: it is the user's alone, also where there was
 * a file that was not. */
TEST(recorded_over_a_file_that_all_could_read_replay)
{
    static const char *const names[] = { "x.http", "x.segments.json" };
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    struct stat st;
    trial t;
    int i;

    strcpy(scratch, "build/tmp-XXXXXX");
    mkdir("build", 0777);
    if (!mkdtemp(scratch)) abort();
    for (i = 0; i < 2; i++) {
        write_file(scratch_path(names[i]), "old");
        if (chmod(scratch_path(names[i]), 0666) != 0) abort();
    }
    trial_begin(&t, REPLAY, s, 2);
    trial_open(&t);
    llmcb_chat_free(t.chat);
    t.cd.transport = llmcb_record_new(t.loop, t.tr, scratch_path("x.http"));
    t.chat = llmcb_chat_new(t.loop, &t.cd);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    llmcb_op_free(t.op);
    t.op = NULL;
    for (i = 0; i < 2; i++) {
        CHECK_INT(stat(scratch_path(names[i]), &st), 0);
        CHECK_INT(st.st_mode & 07777, 0600);
        CHECK(st.st_size > 3);
    }
    trial_end(&t);
    for (i = 0; i < 2; i++) unlink(scratch_path(names[i]));
    unlink(scratch_path("x-2.http"));
    unlink(scratch_path("x-2.segments.json"));
    CHECK_INT(rmdir(scratch), 0);
}

/* What is not there is named, and why; what cannot be written, too. */
TEST(a_recording_says_why_it_cannot_be_read_or_written_replay)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    llmcb_replay_desc d;
    trial t;
    int i;

    for (i = 0; i < 2; i++) {
        trial_begin(&t, REPLAY, &s, 1);
        trial_open(&t);
        llmcb_chat_free(t.chat);
        memset(&d, 0, sizeof d);
        d.path = "build/none/x.http";
        t.cd.transport = i ? llmcb_record_new(t.loop, t.tr, d.path)
                           : llmcb_replay_new(t.loop, &d);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_ask(&t);
        trial_finish(&t, i ? "start|clean|end" : "start|error:ESYS",
                     i ? LLMCB_OK : LLMCB_ESYS);
        if (i) {
            CHECK(strstr(t.log, "build/none/x.http, errno "));
        } else {
            CHECK_INT(llmcb_op_error(t.op)->sys_errno, ENOENT);
            CHECK(strstr(llmcb_op_error(t.op)->message, d.path));
        }
        t.no_clean = true;
        trial_end(&t);
    }
}

/* Where there was no memory for a recording, the server gets no request. */
TEST(no_memory_for_a_recording_is_no_way_to_the_network)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    llmcb_transport *failed;
    char file[64];
    trial t;
    int i;

    strcpy(scratch, "build/none");
    strcpy(file, scratch_path("x.http"));
    for (i = 0; i < 3; i++) { /* a recorder is one block */
        trial_begin(&t, SOCK, &s, 1);
        t.tapes[0].bytes = CLEAN;
        t.tapes[0].len = strlen(CLEAN);
        t.n_tapes = 1;
        t.loop = llmcb_loop_new(&t.ld);
        t.tr = llmcb_socket_transport(t.loop);
        t.transport = REPLAY; /* what is made now; the server stays */
        t.heap.fail_at = t.heap.calls + 1 + i % 2;
        failed = i < 2 ? trial_transport(&t)
                       : llmcb_record_new(t.loop, t.tr, file);
        t.heap.fail_at = 0;
        CHECK(failed != NULL);
        t.cd.transport = failed;
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_ask(&t);
        trial_finish(&t, "start|error:ENOMEM", LLMCB_ENOMEM);
        CHECK_INT(server_requests(t.server), 0);
        t.no_clean = true;
        trial_end(&t);
    }
}

/* ... and one that is cancelled has recorded what came so far: played, it is
 * an answer that was cut. */
TEST(recorded_until_it_was_cancelled_replay)
{
    server_script s = script(stalling, SERVER_STALL);
    llmcb_replay_desc d;
    char file[64];
    trial t;

    strcpy(scratch, "build/tmp-XXXXXX");
    mkdir("build", 0777);
    if (!mkdtemp(scratch)) abort();
    strcpy(file, scratch_path("x.http"));
    trial_begin(&t, REPLAY, &s, 1);
    trial_open(&t);
    llmcb_chat_free(t.chat);
    t.cd.transport = llmcb_record_new(t.loop, t.tr, file);
    t.chat = llmcb_chat_new(t.loop, &t.cd);
    trial_ask(&t);
    trial_until(&t, 5);
    llmcb_op_cancel(t.op);
    trial_finish(&t, NULL, LLMCB_ECANCELLED);
    llmcb_op_free(t.op);
    llmcb_chat_free(t.chat);
    memset(&d, 0, sizeof d);
    d.path = file;
    t.cd.transport = llmcb_replay_new(t.loop, &d);
    t.chat = llmcb_chat_new(t.loop, &t.cd);
    trial_forget(&t);
    trial_ask(&t);
    trial_finish(&t, "start|a|b|c|d|error:ETRUNCATED", LLMCB_ETRUNCATED);
    t.no_clean = true;
    trial_end(&t);
    unlink(file);
    unlink(scratch_path("x.segments.json"));
    CHECK_INT(rmdir(scratch), 0);
}

#ifndef LLMCB_NO_KIT
/* The same for the trace that a handler writes: what is no file is refused at
 * once, and a disk that fills up ends the trace, not the run. */
TEST(fault_112_trace_replay)
{
    int what;

    for (what = 0; what < N_BAD_FILES; what++) {
        server_script s[2] = { script(HELLO, SERVER_CLOSE),
                               script(CLEAN, SERVER_CLOSE) };
        int before = test_failures_here;
        llmcb_handler *trace;
        llmcb_handler *all[4];
        struct stat st;
        trial t;

        if (what == BAD_CLOSE || (what == READ_ONLY && geteuid() == 0))
            continue;
        strcpy(scratch, "build/tmp-XXXXXX");
        mkdir("build", 0777);
        if (!mkdtemp(scratch)) abort();
        trial_begin(&t, REPLAY, s, 2);
        t.loop = llmcb_loop_new(&t.ld);
        make_bad_file(what);
        trace = llmcb_jsonl_handler(
            t.loop, scratch_path(what == MISSING ? "no/x" : "x.http"), true);
        CHECK_INT(trace != NULL, what == NO_SPACE);
        CHECK_INT(sys.blocking_opens, 0);
        CHECK(stat(scratch_path("victim"), &st) != 0);
        t.cd.transport = t.tr = trial_transport(&t);
        memcpy(all, t.callbacks, sizeof t.callbacks);
        all[3] = trace;
        t.cd.callbacks = all;
        t.cd.n_callbacks = trace ? 4 : 3;
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_ask(&t);
        trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
        CHECK_INT(count_of(t.log, "\n"), what == NO_SPACE);
        sys_calm();
        trial_clean(&t);
        llmcb_chat_free(t.chat);
        t.chat = NULL;
        CHECK(stat(scratch_path("x.http"), &st) != 0 || st.st_size == 0 ||
              S_ISDIR(st.st_mode));
        CHECK_INT(llmcb_loop_run_once(t.loop, 0), LLMCB_OK);
        llmcb_handler_free(trace);
        trial_close(&t);
        unlink(scratch_path("x.http"));
        rmdir(scratch_path("x.http"));
        CHECK_INT(rmdir(scratch), 0);
        if (before != test_failures_here) TEST_FAIL("bad file %d", what);
    }
}
#endif

/* ---- G: output, keys, numbers, threads ----------------------------------- */

/* What controls a terminal is shown, wherever the text is cut. */
TEST(fault_113_escapes)
{
    static const char evil[] = "\033]0;x\007\033[2J\x7F\xC2\x9B"
                               "31m\r\b\xE2\x80\xAE<\xE2\x81\xA6>\tok\n";
    size_t len = sizeof evil - 1, cut, n, i;
    char out[2048];
    FILE *f = tmpfile();

    REQUIRE(f);
    for (cut = 0; cut <= len; cut++) {
        llmcb_str a = { evil, cut }, b = { evil + cut, len - cut };

        /* tokens are whole characters */
        if (((unsigned char)evil[cut] & 0xC0) == 0x80) continue;
        rewind(f);
        llmcb_str_print(a, f);
        llmcb_str_print(b, f);
        fflush(f);
        n = (size_t)ftell(f);
        REQUIRE(n < sizeof out);
        rewind(f);
        REQUIRE(fread(out, 1, n, f) == n);
        out[n] = '\0';
        for (i = 0; i < n; i++) {
            unsigned char c = (unsigned char)out[i];
            CHECK(c >= 0x20 || c == '\n' || c == '\t');
            CHECK(c != 0x7F && c != 0x9B);
        }
        CHECK(!strstr(out, "\xE2\x80\xAE") && !strstr(out, "\xE2\x81\xA6"));
        CHECK(strstr(out, "]0;x") && strstr(out, ">\tok\n"));
    }
    fclose(f);
}

TEST(fault_114_bad_keys)
{
    static const char *const bad[] = {
        "sk-canary\r",   "sk-canary\n",   "sk-canary\r\nX-Evil: 1",
        " sk-canary",    "sk-canary ",    "sk-ca nary",
        "sk-canary\x80", "sk-canary\x01", "sk-canary\x7F"
    };
    size_t i, n = sizeof bad / sizeof *bad;
    char *big = (char *)malloc(1000001);

    if (!big) abort();
    memset(big, 'k', 1000000);
    big[1000000] = '\0';
    for (i = 0; i <= n; i++) {
        server_script s = script(CLEAN, SERVER_CLOSE);
        trial t;

        trial_begin(&t, SOCK, &s, 1);
        t.cd.api_key = i < n ? bad[i] : big;
        CHECK(trial_open(&t));
        CHECK_INT(llmcb_chat_error(t.chat)->code, LLMCB_EINVAL);
        trial_ask(&t);
        trial_finish(&t, "", LLMCB_EINVAL);
        CHECK_INT(server_connections(t.server), 0);
        t.cd.api_key = KEY;
        llmcb_chat_free(t.chat);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_end(&t);
    }
    free(big);
}

/* Many streams; some are reset, some stall, some are cancelled. */
typedef struct tally {
    size_t starts, tokens, ends, errors;
    char last; /* of one run at a time */
} tally;

static int tally_note(llmcb_handler *h, const llmcb_event *ev)
{
    tally *n = (tally *)h->user;

    if (is_start(ev->kind)) n->starts++;
    if (ev->kind == LLMCB_LLM_NEW_TOKEN && ev->token->text.len) n->tokens++;
    if (ev->kind == LLMCB_LLM_END) n->ends++;
    if (ev->kind == LLMCB_LLM_ERROR) n->errors++;
    return 0;
}

static void many_streams(int transport, size_t n)
{
    enum { TOKENS = 10 };
    static const char head[] = SSE "Connection: close\r\n\r\n";
    server_script s[8] = { { 0 } };
    llmcb_handler h;
    llmcb_handler *one[1];
    llmcb_op **ops = (llmcb_op **)calloc(n, sizeof *ops);
    char *all = (char *)malloc(strlen(head) + TOKENS * 80 + 200), *at = all;
    size_t i, want = 0, oks = 0, cancels = 0, resets = 0, stalls = 0;
    size_t timeouts = 0, broken = 0, others = 0, cancelled = 0;
    uint32_t seed = 12345;
    tally sum;
    trial t;

    if (!ops || !all) abort();
    at += sprintf(at, "%s", head);
    for (i = 0; i < TOKENS; i++)
        at += sprintf(at, "%s", EV("x"));
    sprintf(at, "%s", FIN DONE);
    /* six good ones, a reset after 3 tokens, a stall after 5 */
    for (i = 0; i < 8; i++)
        s[i] = script(all, SERVER_CLOSE);
    trial_begin(&t, transport, s, 1);
    t.no_clean = true;
    t.cd.idle_ms = t.cd.first_byte_ms = 100000;
    t.cd.connect_ms = LLMCB_FOREVER;
    memset(&h, 0, sizeof h);
    memset(&sum, 0, sizeof sum);
    h.flags = LLMCB_INLINE;
    h.user = &sum;
    h.sync.on_chat_model_start = h.sync.on_llm_new_token = h.sync.on_llm_end =
        h.sync.on_llm_error = tally_note;
    one[0] = &h;
    t.cd.callbacks = one;
    t.cd.n_callbacks = 1;
    t.loop = llmcb_loop_new(&t.ld);
    for (i = 0; i < n; i++) {
        size_t kind = (seed = seed * 1664525u + 1013904223u) >> 8;
        size_t k = (seed >> 16) % TOKENS;
        llmcb_recording rec;
        llmcb_replay_desc rd;
        llmcb_chat *chat;

        kind %= 20; /* 6 of 20 are reset, one stalls, one is cancelled */
        memset(&rec, 0, sizeof rec);
        memset(&rd, 0, sizeof rd);
        rec.bytes = all;
        rec.len = strlen(all);
        rec.end = LLMCB_REPLAY_CLOSE;
        if (kind < 7) rec.len = strlen(head) + k * strlen(EV("x"));
        if (kind < 6) rec.end = LLMCB_REPLAY_RESET;
        if (kind == 6) rec.end = LLMCB_REPLAY_KEEP;
        rd.recordings = &rec;
        rd.n_recordings = 1;
        t.cd.transport = llmcb_replay_new(t.loop, &rd);
        chat = llmcb_chat_new(t.loop, &t.cd);
        ops[i] = llmcb_chat_generate(chat, &question, 1, NULL);
        llmcb_chat_free(chat);
        if (kind == 7) {
            llmcb_op_cancel(ops[i]);
            cancels++;
        } else {
            want += kind < 7 ? k : TOKENS;
        }
        resets += kind < 6;
        stalls += kind == 6;
    }
    CHECK_INT(llmcb_loop_run(t.loop), LLMCB_OK);
    for (i = 0; i < n; i++) {
        llmcb_code code = llmcb_op_code(ops[i]);
        oks += code == LLMCB_OK;
        timeouts += code == LLMCB_ETIMEDOUT;
        broken += code == LLMCB_EIO;
        cancelled += code == LLMCB_ECANCELLED;
        others += code == LLMCB_EBUSY;
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(oks + timeouts + broken + cancelled, n);
    CHECK_INT(others, 0);
    CHECK_INT(broken, resets);
    CHECK_INT(timeouts, stalls);
    CHECK_INT(cancelled, cancels);
    CHECK_INT(sum.starts, sum.ends + sum.errors);
    CHECK_INT(sum.ends, oks);
    CHECK_INT(sum.tokens, want);
    trial_end(&t);
    free(ops);
    free(all);
}

TEST(fault_115_many_streams_replay)
{
#if defined(__SANITIZE_THREAD__)
    many_streams(REPLAY, 1000);
#else
    many_streams(REPLAY, 10000);
#endif
}

/* ... and over sockets, with real resets. */
TEST_ON_NET(fault_115_many_connections)
{
    enum { N = 120 };
    static char good[2000], cut[2000];
    server_script s[N];
    server_segment holds[N];
    llmcb_handler h;
    llmcb_handler *one[1];
    llmcb_op *ops[N];
    size_t i, codes[3] = { 0, 0, 0 }, oks = 0, want = 0;
    char *at = good;
    tally sum;
    trial t;

    at += sprintf(at, "%s", SSE "Connection: close\r\n\r\n");
    for (i = 0; i < 10; i++)
        at += sprintf(at, "%s", EV("x"));
    sprintf(at, "%s", FIN DONE);
    sprintf(cut, "%s", SSE "Connection: close\r\n\r\n" EV("x") EV("x"));
    /* a third is held behind its second token, then reset */
    for (i = 0; i < N; i++) {
        s[i] = script(i % 3 ? good : cut, i % 3 ? SERVER_CLOSE : SERVER_RST);
        holds[i].offset = strlen(cut);
        holds[i].delay_ms = SERVER_HOLD;
        if (i % 3 == 0) {
            s[i].segments = &holds[i];
            s[i].n_segments = 1;
        }
        want += i % 3 ? 10 : 2;
    }
    memset(&h, 0, sizeof h);
    memset(&sum, 0, sizeof sum);
    h.flags = LLMCB_INLINE;
    h.user = &sum;
    h.sync.on_chat_model_start = h.sync.on_llm_new_token = h.sync.on_llm_end =
        h.sync.on_llm_error = tally_note;
    one[0] = &h;
    trial_begin(&t, transport, s, N);
    t.no_clean = true;
    t.cd.callbacks = one;
    t.cd.n_callbacks = 1;
    trial_open(&t);
    for (i = 0; i < N; i++)
        ops[i] = llmcb_chat_generate(t.chat, &question, 1, NULL);
    while (sum.tokens < want && !sys.hung)
        trial_turn(&t);
    for (i = 0; i < N / 3; i++)
        server_go(t.server);
    CHECK_INT(llmcb_loop_run(t.loop), LLMCB_OK);
    for (i = 0; i < N; i++) {
        llmcb_code code = llmcb_op_code(ops[i]);
        oks += code == LLMCB_OK;
        codes[0] += code == LLMCB_EIO;
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(oks, N - N / 3);
    CHECK_INT(codes[0], N / 3);
    CHECK_INT(sum.starts, N);
    CHECK_INT(sum.ends, oks);
    CHECK_INT(sum.errors, N / 3);
    CHECK_INT(sum.tokens, want);
    trial_end(&t);
}

typedef struct other {
    trial *t;
    pthread_t thread;
    llmcb_code said[4];
    llmcb_op *op;
} other;

static void *other_thread(void *arg)
{
    other *o = (other *)arg;

    o->said[0] = llmcb_loop_run_once(o->t->loop, 0);
    o->said[1] = llmcb_op_wait(o->t->op);
    o->said[2] = llmcb_loop_free(o->t->loop);
    o->op = llmcb_chat_generate(o->t->chat, &question, 1, NULL);
    o->said[3] = o->op ? llmcb_op_code(o->op) : LLMCB_ESTATE;
    return NULL;
}

TEST_ON_ALL(fault_116_wrong_thread)
{
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;
    other o;
    int i;

    trial_begin(&t, transport, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_until(&t, 1);
    memset(&o, 0, sizeof o);
    o.t = &t;
    REQUIRE(pthread_create(&o.thread, NULL, other_thread, &o) == 0);
    pthread_join(o.thread, NULL);
    for (i = 0; i < 4; i++)
        CHECK_INT(o.said[i], LLMCB_ESTATE);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    trial_end(&t);
}

typedef struct life {
    int transport;
    pthread_t thread;
    const char *base;
    llmcb_recording *tape;
    size_t right;
    llmcb_code freed;
} life;

static void *life_thread(void *arg)
{
    life *l = (life *)arg;
    llmcb_chat_desc cd;
    llmcb_replay_desc rd;
    llmcb_loop_desc ld;
    llmcb_loop *loop;
    llmcb_chat *chat;
    int i;

    memset(&cd, 0, sizeof cd);
    memset(&rd, 0, sizeof rd);
    memset(&ld, 0, sizeof ld);
    rd.recordings = l->tape;
    rd.n_recordings = 1;
    ld.virtual_clock = l->transport == REPLAY;
    loop = llmcb_loop_new(&ld);
    cd.base_url = l->base;
    cd.api_key = KEY;
    cd.streaming = true;
    cd.transport = l->transport == REPLAY ? llmcb_replay_new(loop, &rd)
                   : l->transport == SOCK ? llmcb_socket_transport(loop)
                                          : llmcb_curl_transport(loop);
    chat = llmcb_chat_new(loop, &cd);
    for (i = 0; i < 20; i++) {
        llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);
        if (llmcb_op_wait(op) == LLMCB_OK &&
            strcmp(llmcb_op_result(op)->generations[0].text.ptr, "clean") == 0)
            l->right++;
        llmcb_op_free(op);
    }
    llmcb_chat_free(chat);
    l->freed = llmcb_loop_free(loop);
    return NULL;
}

TEST_ON_ALL(fault_116_two_loops)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    life l[2];
    trial t;
    int i;

#ifndef LLMCB_NO_CURL
    curl_global_init(CURL_GLOBAL_DEFAULT); /* before there are threads */
#endif
    trial_begin(&t, transport, &s, 1);
    memset(l, 0, sizeof l);
    for (i = 0; i < 2; i++) {
        l[i].transport = transport;
        l[i].base = t.cd.base_url;
        l[i].tape = &t.tapes[0];
        REQUIRE(pthread_create(&l[i].thread, NULL, life_thread, &l[i]) == 0);
    }
    for (i = 0; i < 2; i++)
        pthread_join(l[i].thread, NULL);
    for (i = 0; i < 2; i++) {
        CHECK_INT(l[i].right, 20);
        CHECK_INT(l[i].freed, LLMCB_OK);
    }
    trial_close(&t);
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}
