/* [CURL] over a libcurl that fails: each call into it may fail at each of its
 * places, once and from then on, and what becomes of a transfer may be set.
 * What libcurl does by itself is its own: these stand between it and llmcb.h,
 * as sys.h stands before the system. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdbool.h>
#include <stdio.h>
#ifdef LLMCB_NO_CURL
#include "test.h"

TEST(libcurl_that_fails)
{
    SKIP("libcurl is not installed");
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}
#else
#ifdef OLD_CURL /* what a libcurl of 2020 has */
#define CURL_DISABLE_DEPRECATION
#endif
#include <curl/curl.h>
#ifdef OLD_CURL
#undef LIBCURL_VERSION_NUM
#define LIBCURL_VERSION_NUM 0x074400
#endif
#include <signal.h>
#include <stdarg.h>
#include <string.h>

/* ---- libcurl behind hooks ------------------------------------------------ */

#define LIB_CALLS(X) \
    X(global_init)   \
    X(multi_init)    \
    X(multi_setopt)  \
    X(multi_add)     \
    X(multi_action)  \
    X(slist)         \
    X(easy_init)     \
    X(easy_setopt)   \
    X(easy_pause)
#define LIB_ID(name) LIB_##name,
typedef enum lib_call { LIB_CALLS(LIB_ID) LIB_N } lib_call;
#define LIB_NAME(name) #name,
static const char *const lib_names[] = { LIB_CALLS(LIB_NAME) "none" };

/* All of it on the loop's thread. */
static struct {
    long calls[LIB_N];
    lib_call call; /* fails ... */
    long at;       /* ... at this time, from 1 */
    bool for_ever;
    long struck;
    bool force; /* what is over has ended with this */
    CURLcode result;
    bool notice; /* a message of another kind comes first */
    bool pipe;   /* a TLS library has written to a closed socket */
    curl_socket_callback socket_fn;
    void *socket_user;
} lib;

static void lib_plan(lib_call call, long at, bool for_ever)
{
    memset(lib.calls, 0, sizeof lib.calls);
    lib.call = call;
    lib.at = at;
    lib.for_ever = for_ever;
    lib.struck = 0;
}

static bool lib_fails(lib_call call)
{
    long n = ++lib.calls[call];

    if (lib.call != call || !lib.at || n < lib.at) return false;
    if (n > lib.at && !lib.for_ever) return false;
    lib.struck++;
    return true;
}

static CURLcode lib_global_init(long flags)
{
    return lib_fails(LIB_global_init) ? CURLE_FAILED_INIT
                                      : curl_global_init(flags);
}

static CURLM *lib_multi_init(void)
{
    return lib_fails(LIB_multi_init) ? NULL : curl_multi_init();
}

static CURLMcode lib_multi_setopt(CURLM *m, CURLMoption o, ...)
{
    CURLMcode code;
    va_list ap;

    if (lib_fails(LIB_multi_setopt)) return CURLM_UNKNOWN_OPTION;
    va_start(ap, o);
    if (o == CURLMOPT_SOCKETFUNCTION) {
        lib.socket_fn = va_arg(ap, curl_socket_callback);
        code = (curl_multi_setopt)(m, o, lib.socket_fn);
    } else if (o >= CURLOPTTYPE_FUNCTIONPOINT) {
        code = (curl_multi_setopt)(m, o, va_arg(ap, curl_multi_timer_callback));
    } else if (o >= CURLOPTTYPE_OBJECTPOINT) {
        void *p = va_arg(ap, void *);
        if (o == CURLMOPT_SOCKETDATA) lib.socket_user = p;
        code = (curl_multi_setopt)(m, o, p);
    } else {
        code = (curl_multi_setopt)(m, o, va_arg(ap, long));
    }
    va_end(ap);
    return code;
}

static CURLMcode lib_multi_add(CURLM *m, CURL *e)
{
    return lib_fails(LIB_multi_add) ? CURLM_OUT_OF_MEMORY
                                    : curl_multi_add_handle(m, e);
}

static CURLMcode lib_multi_action(CURLM *m, curl_socket_t fd, int mask,
                                  int *running)
{
    CURLMcode code = curl_multi_socket_action(m, fd, mask, running);

    if (lib.pipe) raise(SIGPIPE);
    return lib_fails(LIB_multi_action) ? CURLM_OUT_OF_MEMORY : code;
}

static CURLMsg *lib_info_read(CURLM *m, int *left)
{
    static CURLMsg other;
    CURLMsg *msg;

    if (lib.notice) {
        lib.notice = false;
        return &other;
    }
    msg = curl_multi_info_read(m, left);
    if (msg && lib.force) msg->data.result = lib.result;
    return msg;
}

static struct curl_slist *lib_slist(struct curl_slist *list, const char *s)
{
    return lib_fails(LIB_slist) ? NULL : curl_slist_append(list, s);
}

static CURL *lib_easy_init(void)
{
    return lib_fails(LIB_easy_init) ? NULL : curl_easy_init();
}

static CURLcode lib_easy_setopt(CURL *e, CURLoption o, ...)
{
    CURLcode code;
    va_list ap;

    if (lib_fails(LIB_easy_setopt)) return CURLE_OUT_OF_MEMORY;
    va_start(ap, o);
    if (o >= CURLOPTTYPE_OFF_T)
        code = (curl_easy_setopt)(e, o, va_arg(ap, curl_off_t));
    else if (o >= CURLOPTTYPE_OBJECTPOINT) /* functions, too */
        code = (curl_easy_setopt)(e, o, va_arg(ap, void *));
    else
        code = (curl_easy_setopt)(e, o, va_arg(ap, long));
    va_end(ap);
    return code;
}

static CURLcode lib_easy_pause(CURL *e, int what)
{
    return lib_fails(LIB_easy_pause) ? CURLE_OUT_OF_MEMORY
                                     : curl_easy_pause(e, what);
}

#undef curl_multi_setopt
#undef curl_easy_setopt
#define curl_global_init lib_global_init
#define curl_multi_init lib_multi_init
#define curl_multi_setopt lib_multi_setopt
#define curl_multi_add_handle lib_multi_add
#define curl_multi_socket_action lib_multi_action
#define curl_multi_info_read lib_info_read
#define curl_slist_append lib_slist
#define curl_easy_init lib_easy_init
#define curl_easy_setopt lib_easy_setopt
#define curl_easy_pause lib_easy_pause
#include "trial.h"

static llmcbi_curl *curl_of(const trial *t)
{
    return (llmcbi_curl *)(void *)t->tr;
}

static llmcbi_transfer *transfer_at(llmcbi_link *l)
{
    return l ? LLMCBI_OWNER(llmcbi_transfer, link, l) : NULL;
}

static llmcbi_transfer *newest(const trial *t)
{
    return transfer_at(curl_of(t)->transfers);
}

/* Stops the library's clocks for as long as a test needs. */
static void clock_stops(void)
{
    sys.mono_ms -= 3600000;
}

static void clock_goes_on(void)
{
    sys.mono_ms += 3600000;
}

/* ---- every call, at each of its places ----------------------------------- */

enum { BY_TCP, BY_UNIX, BY_TLS, N_WAYS };

/* One call over libcurl, then one more with a libcurl that is well. Whether
 * the failure struck. */
static bool play(int way, lib_call call, long at, bool for_ever)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    char path[64], base[128];
    server *unix_server = NULL;
    llmcb_code code, usual = way == BY_TLS ? LLMCB_ETLS : LLMCB_OK;
    bool struck;
    trial t;

    trial_begin(&t, CURL_T, way == BY_UNIX ? NULL : &s, way != BY_UNIX);
    if (way == BY_UNIX) {
        mkdir("build", 0777);
        snprintf(path, sizeof path, "build/curl-%ld.sock", (long)getpid());
        unix_server = server_start_unix(path, &s, 1);
        if (!unix_server) abort();
        t.cd.base_url = server_base(unix_server);
    } else if (way == BY_TLS) { /* the server speaks none */
        snprintf(base, sizeof base, "https://127.0.0.1:%d/v1",
                 server_port(t.server));
        t.cd.base_url = base;
        t.cd.http2 = true;
        t.cd.ca_file = "/dev/null";
    }
    lib_plan(call, at, for_ever);
    trial_open(&t);
    trial_ask(&t);
    trial_wait(&t);
    struck = lib.struck > 0;
    trial_check(&t, NULL);
    code = llmcb_op_code(t.op);
    if (code != usual) CHECK_STR(llmcb_code_name(code), "LLMCB_ENOMEM");
    if (!struck) CHECK_STR(llmcb_code_name(code), llmcb_code_name(usual));
    if (!t.chat) CHECK_INT(code, LLMCB_ENOMEM);
    llmcb_op_free(t.op);
    lib_plan(LIB_N, 0, false);
    if (!t.chat) {
        t.cd.transport = t.tr = trial_transport(&t);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
    }
    trial_forget(&t);
    trial_ask(&t);
    trial_finish(&t, usual ? "start|error:ETLS" : "start|clean|end", usual);
    t.no_clean = true;
    if (!unix_server) {
        trial_end(&t);
        return struck;
    }
    trial_clean(&t);
    llmcb_chat_free(t.chat);
    t.chat = NULL;
    llmcb_loop_free(t.loop);
    t.loop = NULL;
    server_stop(unix_server);
    trial_close(&t);
    return struck;
}

TEST(each_call_may_fail)
{
    static const lib_call calls[] = { LIB_global_init, LIB_multi_init,
                                      LIB_multi_setopt, LIB_multi_add,
                                      LIB_multi_action, LIB_slist,
                                      LIB_easy_init, LIB_easy_setopt };
    size_t k;
    int way, ever;
    long at;

    for (way = 0; way < N_WAYS; way++)
        for (k = 0; k < sizeof calls / sizeof *calls; k++)
            for (ever = 0; ever < 2; ever++) {
                for (at = 1; at < 100; at++) {
                    int before = test_failures_here;
                    bool struck = play(way, calls[k], at, ever != 0);

                    if (before != test_failures_here) {
                        TEST_FAIL("%s %ld, %s, way %d", lib_names[calls[k]],
                                  at, ever ? "for ever" : "once", way);
                        return;
                    }
                    if (!struck) break;
                }
                CHECK(at > 1);
                CHECK(at < 100);
            }
}

/* libcurl knows a unix socket as a host that nobody named. */
TEST(no_unix_socket_is_there)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_message question;
    llmcb_chat_desc d;
    llmcb_chat *chat;
    llmcb_op *op;

    memset(&question, 0, sizeof question);
    question.content = "Tell me a joke";
    memset(&d, 0, sizeof d);
    d.base_url = "unix:build/none.sock:/v1";
    d.api_key = "";
    d.transport = llmcb_curl_transport(loop);
    d.max_retries = -1;
    chat = llmcb_chat_new(loop, &d);
    op = llmcb_chat_generate(chat, &question, 1, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECONNECT);
    CHECK_STR(llmcb_op_error(op)->message, "could not connect to the socket");
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

/* Our own memory, on the way by a unix socket. */
TEST(no_memory_by_a_unix_socket)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    char path[64];
    server *server;
    long i;

    mkdir("build", 0777);
    snprintf(path, sizeof path, "build/curl-%ld.sock", (long)getpid());
    server = server_start_unix(path, &s, 1);
    if (!server) abort();
    trial_shared = true;
    for (i = 1;; i++) {
        bool used;
        trial t;

        trial_begin(&t, CURL_T, NULL, 0);
        t.cd.base_url = server_base(server);
        trial_open(&t);
        t.heap.fail_at = t.heap.calls + i;
        trial_ask(&t);
        trial_wait(&t);
        used = t.heap.calls >= t.heap.fail_at;
        t.heap.fail_at = 0;
        trial_check(&t, NULL);
        if (llmcb_op_code(t.op) != LLMCB_OK)
            CHECK_STR(llmcb_code_name(llmcb_op_code(t.op)), "LLMCB_ENOMEM");
        llmcb_op_free(t.op);
        trial_forget(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        t.no_clean = true;
        trial_end(&t);
        if (!used) break;
        REQUIRE(i < 300);
    }
    CHECK(i > 5);
    server_stop(server);
    trial_shared = false;
}

/* Bytes that came behind an answer ask for another connection: that, too,
 * may be refused. */
TEST(surplus_and_a_call_that_fails)
{
    long at;

    for (at = 1; at < 100; at++) {
        server_segment hold = { strlen(CLEAN_KEPT), SERVER_HOLD };
        server_script s[2] = { script(CLEAN_KEPT "surplus", SERVER_KEEP),
                               script(CLEAN_KEPT, SERVER_KEEP) };
        bool struck;
        trial t;

        s[0].segments = &hold;
        s[0].n_segments = 1;
        trial_begin(&t, CURL_T, s, 2);
        trial_open(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        llmcb_op_free(t.op);
        server_go(t.server);
        CHECK(server_wait_sent(t.server, 1));
        lib_plan(LIB_easy_setopt, at, false);
        trial_forget(&t);
        trial_ask(&t);
        trial_wait(&t);
        trial_check(&t, NULL);
        struck = lib.struck > 0;
        CHECK_INT(llmcb_op_code(t.op), struck ? LLMCB_ENOMEM : LLMCB_OK);
        lib_plan(LIB_N, 0, false);
        trial_clean(&t);
        CHECK(server_connections(t.server) > 1);
        t.no_clean = true;
        trial_end(&t);
        if (!struck) break;
    }
    CHECK(at > 30);
    CHECK(at < 100);
}

/* Without a limit on connecting libcurl is given none that is shorter. */
TEST(no_limit_on_connecting)
{
    static const int64_t limits[] = { LLMCB_FOREVER, INT64_MAX, 5000 };
    size_t i;

    for (i = 0; i < 3; i++) {
        server_script s = script(CLEAN_KEPT, SERVER_KEEP);
        trial t;

        trial_begin(&t, CURL_T, &s, 1);
        t.cd.connect_ms = limits[i];
        trial_open(&t);
        trial_ask(&t);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        trial_end(&t);
    }
}

/* For what may be another machine, as libcurl cannot know of 0.0.0.0. */
static void ask_elsewhere(trial *t)
{
    static char base[64];

    snprintf(base, sizeof base, "http://0.0.0.0:%d/v1", server_port(t->server));
    t->cd.base_url = base;
    t->cd.allow_cleartext_key = true;
}

/* Once there is a connection its limit is over, however long the answer takes:
 * on a new connection, and on one that was kept. */
TEST(connect_ms_ends_with_the_connection)
{
    server_segment hold = { 0, SERVER_HOLD };
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    size_t i;
    int k;
    trial t;

    s.segments = &hold;
    s.n_segments = 1;
    trial_begin(&t, CURL_T, &s, 1);
    t.cd.connect_ms = 5000;
    t.cd.first_byte_ms = t.cd.idle_ms = LLMCB_FOREVER;
    ask_elsewhere(&t);
    trial_open(&t);
    for (i = 1; i <= 2; i++) {
        trial_forget(&t);
        trial_ask(&t);
        for (k = 0; k < 20000 && server_requests(t.server) < i; k++)
            llmcb_loop_run_once(t.loop, 1);
        CHECK_INT(server_requests(t.server), i);
        CHECK(server_wait_held(t.server, i));
        for (k = 0; k < 3; k++) llmcb_loop_run_once(t.loop, 0);
        pass_ms(&t, 20000);
        if (llmcb_op_done(t.op))
            TEST_FAIL("request %d: %s", (int)i,
                      llmcb_op_error(t.op)->message);
        server_go(t.server);
        trial_finish(&t, "start|clean|end", LLMCB_OK);
        llmcb_op_free(t.op);
        t.op = NULL;
    }
    CHECK_INT(server_connections(t.server), 1);
    t.no_clean = true;
    trial_end(&t);
}

/* A TCP connection is none yet where there is to be TLS. */
TEST(connect_ms_goes_on_without_tls)
{
    server_script s = script("", SERVER_STALL);
    char base[128];
    bool without;
    trial t;

    s.at_accept = 1;
    trial_begin(&t, CURL_T, &s, 1);
    snprintf(base, sizeof base, "https://127.0.0.1:%d/v1",
             server_port(t.server));
    t.cd.base_url = base;
    t.cd.connect_ms = 100;
    t.cd.first_byte_ms = t.cd.idle_ms = LLMCB_FOREVER;
    trial_open(&t);
    trial_ask(&t);
    trial_wait(&t);
    without = llmcb_op_code(t.op) == LLMCB_ETLS;
    if (!without) {
        trial_finish(&t, "start|error:ETIMEDOUT", LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_CONNECT);
    }
    t.no_clean = true;
    trial_end(&t);
    if (without) SKIP("libcurl has no authorities to trust");
}

/* A chat that names no transport has libcurl; and plain sockets, which do
 * for http://, where libcurl cannot be had. */
TEST(sockets_where_libcurl_cannot_be_had)
{
    int fails;

    for (fails = 0; fails < 2; fails++) {
        server_script s = script(CLEAN_KEPT, SERVER_KEEP);
        int i;
        trial t;

        trial_begin(&t, CURL_T, &s, 1);
        t.loop = llmcb_loop_new(&t.ld);
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        lib_plan(LIB_global_init, fails, true);
        for (i = 0; i < 2; i++) {
            trial_forget(&t);
            trial_ask(&t);
            trial_finish(&t, "start|clean|end", LLMCB_OK);
            llmcb_op_free(t.op);
        }
        t.op = NULL;
        CHECK_INT(lib.calls[LIB_easy_init], fails ? 0 : 2);
        CHECK_INT(lib.calls[LIB_global_init], 1);
        CHECK_INT(server_connections(t.server), 1);
        lib_plan(LIB_N, 0, false);
        trial_end(&t);
    }
}

/* ---- what libcurl says of the end ---------------------------------------- */

/* Each code of libcurl, for a connection that was refused, and a response of
 * which the head or a part of the body has come. */
TEST(each_code_has_its_meaning)
{
    static const struct {
        CURLcode result;
        llmcb_code code[3];
    } rows[] = {
        { CURLE_COULDNT_RESOLVE_HOST, { LLMCB_EDNS } },
        { CURLE_COULDNT_RESOLVE_PROXY, { LLMCB_EDNS } },
        { CURLE_COULDNT_CONNECT, { LLMCB_ECONNECT } },
        { CURLE_SSL_CONNECT_ERROR, { LLMCB_ETLS } },
        { CURLE_PEER_FAILED_VERIFICATION, { LLMCB_ETLS } },
        { CURLE_SSL_CERTPROBLEM, { LLMCB_ETLS } },
        { CURLE_SSL_CIPHER, { LLMCB_ETLS } },
        { CURLE_SSL_CACERT_BADFILE, { LLMCB_ETLS } },
        { CURLE_SSL_ISSUER_ERROR, { LLMCB_ETLS } },
        { CURLE_SSL_INVALIDCERTSTATUS, { LLMCB_ETLS } },
        { CURLE_SSL_PINNEDPUBKEYNOTMATCH, { LLMCB_ETLS } },
        { CURLE_SSL_ENGINE_NOTFOUND, { LLMCB_ETLS } },
        { CURLE_SSL_ENGINE_SETFAILED, { LLMCB_ETLS } },
        { CURLE_USE_SSL_FAILED, { LLMCB_ETLS } },
        { CURLE_OPERATION_TIMEDOUT, { LLMCB_ETIMEDOUT } },
        { CURLE_UNSUPPORTED_PROTOCOL, { LLMCB_EPROTO } },
        { CURLE_WEIRD_SERVER_REPLY, { LLMCB_EPROTO } },
        { CURLE_BAD_CONTENT_ENCODING, { LLMCB_EPROTO } },
        /* while it reads a head it says this of one that is too long */
        { CURLE_OUT_OF_MEMORY, { LLMCB_ENOMEM, LLMCB_ELIMIT, LLMCB_ENOMEM } },
        { CURLE_RECV_ERROR, { LLMCB_EIO } },
        { CURLE_SEND_ERROR, { LLMCB_EIO } },
        { CURLE_GOT_NOTHING, { LLMCB_EIO } },
        { CURLE_PARTIAL_FILE, { LLMCB_ETRUNCATED } }
    };
    static const char *const bytes[] = {
        "", /* refused */
        SSE "Content-Length: 0\r\n\r\n",
        SSE "Content-Length: 9\r\n\r\n: x"
    };
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    int deaf = socket(AF_INET, SOCK_STREAM, 0), how;
    char refused[64];
    size_t i;

    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(deaf, (struct sockaddr *)&a, sizeof a) != 0 ||
        getsockname(deaf, (struct sockaddr *)&a, &len) != 0)
        abort();
    snprintf(refused, sizeof refused, "http://127.0.0.1:%d/v1",
             (int)ntohs(a.sin_port));
    for (i = 0; i < sizeof rows / sizeof *rows; i++)
        for (how = 0; how < 3; how++) {
            server_script s[2] = { script(bytes[how], SERVER_CLOSE),
                                   script(CLEAN, SERVER_CLOSE) };
            llmcb_code want =
                rows[i].code[how] ? rows[i].code[how] : rows[i].code[0];
            int before = test_failures_here;
            trial t;

            trial_begin(&t, CURL_T, how ? s : s + 1, how ? 2 : 1);
            if (!how) t.cd.base_url = refused;
            trial_open(&t);
            lib.force = true;
            lib.result = rows[i].result;
            trial_ask(&t);
            trial_finish(&t, NULL, want);
            lib.force = false;
            t.no_clean = !how;
            trial_end(&t);
            if (before != test_failures_here)
                TEST_FAIL("%s, way %d", curl_easy_strerror(rows[i].result),
                          how);
        }
    close(deaf);
}

/* libcurl may have more to tell than that something is over. */
TEST(other_messages_are_passed_over)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    trial t;

    trial_begin(&t, CURL_T, &s, 1);
    trial_open(&t);
    lib.notice = true;
    trial_ask(&t);
    trial_finish(&t, "start|clean|end", LLMCB_OK);
    CHECK(!lib.notice);
    trial_end(&t);
}

/* ---- pausing ------------------------------------------------------------- */

/* Two tokens at once, of which the window takes one; then the rest. */
typedef struct slow {
    trial t;
    gate gate;
    server_segment hold;
    server_script s[2];
} slow;

static void slow_open(slow *w, const char *first, const char *rest)
{
    static const gate closed = GATE;
    static char bytes[2048];

    w->gate = closed;
    snprintf(bytes, sizeof bytes, "%s%s", first, rest);
    w->hold.offset = strlen(first);
    w->hold.delay_ms = SERVER_HOLD;
    w->s[0] = script(bytes, SERVER_CLOSE);
    w->s[0].segments = &w->hold;
    w->s[0].n_segments = 1;
    w->s[1] = script(CLEAN, SERVER_CLOSE);
    trial_begin(&w->t, CURL_T, w->s, 2);
    lib_plan(LIB_N, 0, false);
    w->t.cd.limits.window_events = 1;
    w->t.r[2]->gate = &w->gate;
    w->t.r[2]->gate_kind = LLMCB_LLM_NEW_TOKEN;
    trial_open(&w->t);
    trial_ask(&w->t);
    while (gate_came(&w->gate) < 1) llmcb_loop_run_once(w->t.loop, 1);
    CHECK(server_wait_held(w->t.server, 1));
}

static bool slow_is_held(const slow *w)
{
    return newest(&w->t) && newest(&w->t)->held;
}

#define PAUSED SSE "Connection: close\r\n\r\n" EV("a") EV("b") EV("c")

/* What comes while the handler is slow is left with libcurl. */
TEST(paused_transfer_goes_on)
{
    slow w;

    slow_open(&w, PAUSED, EV("d") FIN DONE);
    CHECK(!slow_is_held(&w));
    server_go(w.t.server);
    while (!slow_is_held(&w) && !llmcb_op_done(w.t.op))
        llmcb_loop_run_once(w.t.loop, 10);
    gate_let(&w.gate, EVERYBODY);
    trial_finish(&w.t, "start|a|b|c|d||end", LLMCB_OK);
    trial_end(&w.t);
}

/* Nothing has come meanwhile: there is nothing to go on with. */
TEST(paused_transfer_was_silent)
{
    slow w;

    slow_open(&w, PAUSED, EV("d") FIN DONE);
    gate_let(&w.gate, EVERYBODY);
    trial_until(&w.t, 4);
    CHECK(!slow_is_held(&w));
    server_go(w.t.server);
    trial_finish(&w.t, "start|a|b|c|d||end", LLMCB_OK);
    CHECK_INT(lib.calls[LIB_easy_pause], 0);
    trial_end(&w.t);
}

TEST(paused_transfer_cannot_go_on)
{
    slow w;

    slow_open(&w, PAUSED, EV("d") FIN DONE);
    server_go(w.t.server);
    while (!slow_is_held(&w) && !llmcb_op_done(w.t.op))
        llmcb_loop_run_once(w.t.loop, 10);
    lib_plan(LIB_easy_pause, 1, false);
    gate_let(&w.gate, EVERYBODY);
    trial_finish(&w.t, "start|a|b|c|error:ENOMEM", LLMCB_ENOMEM);
    CHECK_INT(lib.struck, 1);
    lib_plan(LIB_N, 0, false);
    trial_end(&w.t);
}

/* The answer was over in what the window had held back: the rest that libcurl
 * holds is not read for the sake of the connection. */
TEST(paused_transfer_is_over)
{
    slow w;

    slow_open(&w, PAUSED FIN DONE, ": more\n");
    server_go(w.t.server);
    while (!slow_is_held(&w) && !llmcb_op_done(w.t.op))
        llmcb_loop_run_once(w.t.loop, 10);
    gate_let(&w.gate, EVERYBODY);
    trial_finish(&w.t, "start|a|b|c||end", LLMCB_OK);
    CHECK(!curl_of(&w.t)->transfers);
    trial_end(&w.t);
}

/* ---- after the answer ---------------------------------------------------- */

/* What comes behind [DONE] is read, so that the connection can be kept; but
 * not without end. */
static void linger(size_t more)
{
    size_t cap = more + 1000, head;
    char *bytes = (char *)malloc(cap);
    server_segment hold;
    server_script s[2];
    trial t;

    if (!bytes) abort();
    head = (size_t)snprintf(bytes, cap, "%sContent-Length: %u\r\n\r\n%s", SSE,
                            (unsigned)(strlen(TWO FIN DONE) + more),
                            TWO FIN DONE);
    memset(bytes + head, ':', more);
    hold.offset = head;
    hold.delay_ms = SERVER_HOLD;
    s[0] = script(bytes, SERVER_KEEP);
    s[0].len = head + more;
    s[0].segments = &hold;
    s[0].n_segments = 1;
    s[1] = script(CLEAN_KEPT, SERVER_KEEP);
    trial_begin(&t, CURL_T, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    CHECK(newest(&t) && !newest(&t)->x);
    clock_stops();
    server_go(t.server);
    while (curl_of(&t)->transfers && t.turns--)
        llmcb_loop_run_once(t.loop, 10);
    CHECK(!curl_of(&t)->transfers);
    clock_goes_on();
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

/* ... and a libcurl that fails meanwhile is nobody's failure. */
TEST(lingering_transfer_fails)
{
    server_script s[2] = { script(SSE "Content-Length: 9999\r\n\r\n" TWO DONE,
                                  SERVER_STALL),
                           script(CLEAN_KEPT, SERVER_KEEP) };
    trial t;

    trial_begin(&t, CURL_T, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo|end", LLMCB_OK);
    clock_stops();
    CHECK(newest(&t) && !newest(&t)->x);
    lib_plan(LIB_multi_action, 1, true);
    llmcbi_curl_action(curl_of(&t), CURL_SOCKET_TIMEOUT, 0);
    llmcbi_curl_action(curl_of(&t), CURL_SOCKET_TIMEOUT, 0);
    CHECK_INT(lib.struck, 2);
    lib_plan(LIB_N, 0, false);
    llmcb_loop_run_once(t.loop, 0);
    CHECK(!curl_of(&t)->transfers);
    CHECK_INT(llmcb_op_code(t.op), LLMCB_OK);
    clock_goes_on();
    trial_end(&t);
}

/* The server has answered before it read the question: libcurl would still
 * read that from memory that is gone. */
TEST(answer_before_the_request_is_sent)
{
    static const char answer[] = SSE "\r\n" TWO FIN DONE;
    size_t n = 8u << 20;
    char *long_text = (char *)malloc(n + 1), base[64];
    llmcb_message m = { .role = LLMCB_USER };
    int listener = listen_narrowly(base, sizeof base), fd = -1;
    trial t;

    if (!long_text) abort();
    memset(long_text, 'x', n);
    long_text[n] = '\0';
    trial_begin(&t, CURL_T, NULL, 0);
    t.cd.base_url = base;
    trial_open(&t);
    m.content = long_text;
    t.op = llmcb_chat_generate(t.chat, &m, 1, NULL);
    while (fd < 0 && !llmcb_op_done(t.op)) {
        llmcb_loop_run_once(t.loop, 1);
        fd = accept(listener, NULL, NULL);
    }
    if (send(fd, answer, strlen(answer), 0) < 0) abort();
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    CHECK(!curl_of(&t)->transfers);
    close(fd);
    t.no_clean = true;
    trial_end(&t);
    close(listener);
    free(long_text);
}

/* ---- heads --------------------------------------------------------------- */

/* The fields of an interim response are not those of the answer. */
TEST(interim_fields_are_not_the_answer)
{
    server_script s = script("HTTP/1.1 103 Early\r\nContent-Type: text/html\r\n"
                             "Content-Encoding: zip\r\n\r\n" CLEAN_KEPT,
                             SERVER_KEEP);
    trial t;

    trial_begin(&t, CURL_T, &s, 1);
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|clean|end", LLMCB_OK);
    trial_end(&t);
}

/* ---- descriptors --------------------------------------------------------- */

/* Of two transfers the one fails whose descriptor cannot be watched. */
TEST(unwatched_transfer_fails_alone)
{
    server_segment hold = { 0, SERVER_HOLD };
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    llmcb_op *op;
    trial t;

    s.segments = &hold;
    s.n_segments = 1;
    trial_begin(&t, CURL_T, &s, 1);
    t.cd.callbacks = NULL;
    t.cd.n_callbacks = 0;
    trial_open(&t);
    op = llmcb_chat_generate(t.chat, &question, 1, NULL);
    while (!server_requests(t.server)) llmcb_loop_run_once(t.loop, 1);
    trial_ask(&t);
    while (!curl_of(&t)->transfers->next) llmcb_loop_run_once(t.loop, 1);
    /* the first is no longer the head of the list, and is told of */
    t.heap.fail_at = t.heap.calls + 1;
    CHECK_INT(lib.socket_fn(transfer_at(newest(&t)->link.next)->easy, 0,
                            CURL_POLL_IN, lib.socket_user, NULL),
              0);
    t.heap.fail_at = 0;
    while (!llmcb_op_done(op)) llmcb_loop_run_once(t.loop, 10);
    CHECK_INT(llmcb_op_code(op), LLMCB_ENOMEM);
    llmcb_op_free(op);
    server_go(t.server);
    server_go(t.server);
    trial_wait(&t);
    CHECK_INT(llmcb_op_code(t.op), LLMCB_OK);
    t.no_clean = true;
    trial_end(&t);
}

/* A descriptor of a handle that is on its way out has nobody to fail. */
TEST(unwatched_descriptor_of_nobody)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    CURL *stranger = curl_easy_init();
    trial t;

    trial_begin(&t, CURL_T, &s, 1);
    trial_open(&t);
    trial_ask(&t);
    while (!curl_of(&t)->transfers) llmcb_loop_run_once(t.loop, 0);
    t.heap.fail_at = t.heap.calls + 1;
    CHECK_INT(lib.socket_fn(stranger, 0, CURL_POLL_INOUT, lib.socket_user,
                            NULL),
              0);
    t.heap.fail_at = 0;
    trial_finish(&t, "start|clean|end", LLMCB_OK);
    curl_easy_cleanup(stranger);
    trial_end(&t);
}

/* A libcurl that never says that it is done with a descriptor: the loop has
 * it no more when the transport is gone. */
TEST(forgotten_descriptors_are_left)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    int fds[2];
    trial t;

    if (pipe(fds) != 0) abort();
    trial_begin(&t, CURL_T, &s, 1);
    trial_open(&t);
    trial_ask(&t);
    while (!curl_of(&t)->transfers) llmcb_loop_run_once(t.loop, 0);
    lib.socket_fn(newest(&t)->easy, fds[0], CURL_POLL_IN,
                  lib.socket_user, NULL);
    trial_finish(&t, "start|clean|end", LLMCB_OK);
    trial_end(&t);
    close(fds[0]);
    close(fds[1]);
}

/* More connections end their answers than are kept. */
TEST(more_connections_than_are_kept)
{
    enum { MANY = LLMCBI_MAX_IDLE + 2 };
    server_segment hold = { 0, SERVER_HOLD };
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    llmcb_op *ops[MANY];
    size_t i;
    trial t;

    s.segments = &hold;
    s.n_segments = 1;
    trial_begin(&t, CURL_T, &s, 1);
    t.cd.callbacks = NULL;
    t.cd.n_callbacks = 0;
    trial_open(&t);
    for (i = 0; i < MANY; i++)
        ops[i] = llmcb_chat_generate(t.chat, &question, 1, NULL);
    while (server_requests(t.server) < MANY && !llmcb_op_done(ops[0]))
        llmcb_loop_run_once(t.loop, 1);
    for (i = 0; i < MANY; i++) server_go(t.server);
    CHECK(server_wait_sent(t.server, MANY));
    for (i = 0; i < MANY; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(server_connections(t.server), MANY);
    CHECK(curl_of(&t)->n_idle <= LLMCBI_MAX_IDLE);
    CHECK(curl_of(&t)->n_idle >= LLMCBI_MAX_IDLE - 1);
    t.no_clean = true;
    trial_end(&t);
}

/* ---- SIGPIPE ------------------------------------------------------------- */

static volatile sig_atomic_t n_pipes;

static void on_pipe(int sig)
{
    (void)sig;
    n_pipes++;
}

static bool pipe_is_pending(void)
{
    sigset_t pending;

    sigpending(&pending);
    return sigismember(&pending, SIGPIPE) == 1;
}

/* A call with TLS in which each turn of libcurl's causes a SIGPIPE. */
static void pipes(bool blocked, bool pending)
{
    server_script s = script("no TLS", SERVER_ACCEPT_CLOSE);
    struct sigaction act, old;
    sigset_t set, before;
    char base[64];
    int sig;
    trial t;

    memset(&act, 0, sizeof act);
    act.sa_handler = on_pipe;
    sigaction(SIGPIPE, &act, &old);
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &set, &before);
    n_pipes = 0;
    if (pending) raise(SIGPIPE);
    trial_begin(&t, CURL_T, &s, 1);
    snprintf(base, sizeof base, "https://127.0.0.1:%d/v1",
             server_port(t.server));
    t.cd.base_url = base;
    trial_open(&t);
    lib.pipe = true;
    trial_ask(&t);
    trial_wait(&t);
    lib.pipe = false;
    CHECK(llmcb_op_code(t.op) != LLMCB_OK);
    CHECK(lib.calls[LIB_multi_action] > 0);
    t.no_clean = true;
    trial_end(&t);
    CHECK_INT(n_pipes, 0);
    CHECK_INT(pipe_is_pending(), pending);
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    CHECK_INT(sigismember(&set, SIGPIPE), blocked);
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    if (pending) sigwait(&set, &sig);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sigaction(SIGPIPE, &old, NULL);
}

/* The program's handler is not called, and what it had blocked stays so. */
TEST(sigpipe_of_a_tls_library_is_taken_away)
{
    pipes(false, false);
    pipes(true, false);
}

/* One that waited before is the program's. */
TEST(sigpipe_of_the_program_stays)
{
    pipes(true, true);
}

/* ---- requests of other transports ---------------------------------------- */

/* A transport of the program's that passes on another address. */
TEST(address_of_another_transport)
{
    server_script s = script(CLEAN_KEPT, SERVER_KEEP);
    bend b;
    trial t;

    trial_begin(&t, CURL_T, &s, 1);
    trial_open(&t);
    trial_bend(&t, &b);
    b.url = "http://:0/";
    trial_ask(&t);
    trial_wait(&t);
    CHECK(llmcb_op_code(t.op) != LLMCB_OK);
    llmcb_op_free(t.op);
    trial_forget(&t);
    b.url = server_base(t.server);
    trial_ask(&t);
    trial_finish(&t, "start|clean|end", LLMCB_OK);
    t.no_clean = true;
    trial_end(&t);
}

int main(int argc, char **argv)
{
    alarm(160); /* what hangs is killed */
    return test_main(argc, argv);
}
#endif
