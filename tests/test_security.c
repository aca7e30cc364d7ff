/* Who is told what: the key and the prompt reach the one host that was named
 * and nobody else, whatever servers, the environment and files of the user
 * say; they are in no text that the library makes; the key leaves no trace in
 * memory that was given back. Then limits from both sides, descriptors and
 * signals. Servers record what they are sent. */
#include "trial.h"

/* ---- helpers ------------------------------------------------------------- */

static bool told_secret(server *s)
{
    size_t i;

    for (i = 0; i < server_requests(s); i++) {
        const server_req *r = server_request(s, i);
        if (has_canary(r->head) || has_canary(r->body)) return true;
    }
    return false;
}

/* The server that was named is told both: else the rest proves nothing. */
static void check_told(server *s, size_t i)
{
    const server_req *r = server_request(s, i);
    char v[64];

    if (!r) {
        TEST_FAIL("there was no request");
        return;
    }
    CHECK_STR(server_header(r, "Authorization", v, sizeof v), "Bearer " KEY);
    CHECK(strstr(r->body, PROMPT));
}

/* ---- redirects and what else a server may suggest ------------------------ */

static void redirect(int transport, const char *status, const char *field,
                     const char *where, llmcb_code code)
{
    server_script bait = script(CLEAN, SERVER_CLOSE), s[2];
    server *other = server_start(&bait, 1);
    char bytes[1024], target[256], log[64];
    int before = test_failures_here, fds = open_fds();
    trial t;

    REQUIRE(other);
    snprintf(target, sizeof target, where, server_port(other));
    snprintf(bytes, sizeof bytes,
             "HTTP/1.1 %s X\r\n%s: %s\r\nContent-Length: 0\r\n\r\n", status,
             field, target);
    s[0] = script(bytes, SERVER_KEEP);
    s[1] = script(CLEAN, SERVER_CLOSE);
    trial_begin(&t, transport, s, 2);
    t.fds = fds;
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    snprintf(log, sizeof log, "start|error:%s", llmcb_code_name(code) + 6);
    trial_finish(&t, log, code);
    CHECK(!strstr(llmcb_op_error(t.op)->message, "secret"));
    CHECK_INT(server_requests(t.server), 1);
    check_told(t.server, 0);
    trial_clean(&t);
    CHECK_INT(server_connections(other), 0);
    /* trial_close counts descriptors */
    CHECK_INT(server_requests(t.server), 2);
    trial_close(&t);
    server_stop(other);
    if (before != test_failures_here)
        TEST_FAIL("status %s, %s: %s", status, field, target);
}

TEST_ON_NET(redirects_are_not_followed)
{
    static const char *const status[] = { "300", "301", "302", "303",
                                          "305", "307", "308" };
    static const char *const where[] = {
        "http://127.0.0.1:%d/v1/chat/completions",
        ("http://127.0.0.1:%d/?token=secret&key=" KEY),
        "//127.0.0.1:%d/v1",
        "http://localhost:%d/",
        "ftp://127.0.0.1:%d/",
        "file:///dev/null#%d",
        "HTTP://u:secret@127.0.0.1:%d/",
        "unix:/tmp/x-%d:/",
        "gopher://127.0.0.1:%d/_"
    };
    size_t i, k;

    for (i = 0; i < sizeof status / sizeof *status; i++)
        for (k = 0; k < sizeof where / sizeof *where; k++)
            redirect(transport, status[i], "Location", where[k],
                     LLMCB_EREDIRECT);
}

/* No second request, whatever it asks for; nothing is kept for the next. */
TEST_ON_NET(other_suggestions_are_not_followed)
{
    static const char *const fields[][3] = {
        { "401", "WWW-Authenticate", "Basic realm=\"%d\"" },
        { "401", "WWW-Authenticate", "Negotiate" },
        { "401", "WWW-Authenticate", "Digest realm=\"%d\", nonce=\"1\"" },
        { "400", "Refresh", "0; url=http://127.0.0.1:%d/" },
        { "400", "Alt-Svc", "http/1.1=\"127.0.0.1:%d\"; ma=3600" },
        { "400", "Location", "http://127.0.0.1:%d/" },
        { "400", "Set-Cookie", "a=%d" },
        { "400", "Strict-Transport-Security", "max-age=%d" }
    };
    size_t i;

    for (i = 0; i < sizeof fields / sizeof *fields; i++)
        redirect(transport, fields[i][0], fields[i][1], fields[i][2],
                 LLMCB_EHTTP);
}

TEST_ON_NET(cookies_are_not_kept)
{
    server_script s[2] = {
        script(OK "Set-Cookie: a=1; Path=/\r\nContent-Type: "
                  "text/event-stream\r\nContent-Length: 75\r\n\r\n" EV("clean")
                      DONE,
               SERVER_KEEP),
        script(CLEAN, SERVER_CLOSE)
    };
    char v[64];
    trial t;

    trial_begin(&t, transport, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|clean|end", LLMCB_OK);
    trial_clean(&t);
    CHECK_INT(server_requests(t.server), 2);
    CHECK(!server_header(server_request(t.server, 1), "Cookie", v, sizeof v));
    trial_close(&t);
}

/* ---- the environment and files of the user ------------------------------- */

static const char *const proxy_names[] = { "http_proxy",  "HTTP_PROXY",
                                           "https_proxy", "HTTPS_PROXY",
                                           "all_proxy",   "ALL_PROXY" };
#define N_PROXIES (sizeof proxy_names / sizeof *proxy_names)

static void set_proxies(const char *format, int port)
{
    char url[128];
    size_t i;

    for (i = 0; i < N_PROXIES; i++) {
        if (!format) {
            unsetenv(proxy_names[i]);
            continue;
        }
        snprintf(url, sizeof url, format, port);
        setenv(proxy_names[i], url, 1);
    }
}

static char home[64];

/* A home with files that libcurl and its tool would read. */
static void home_make(int port)
{
    static const char *const names[] = { ".netrc", "_netrc", ".curlrc",
                                         ".config/curlrc" };
    char path[128];
    size_t i;

    strcpy(home, "build/tmp-XXXXXX");
    mkdir("build", 0777);
    if (!mkdtemp(home)) abort();
    snprintf(path, sizeof path, "%s/.config", home);
    mkdir(path, 0700);
    for (i = 0; i < 4; i++) {
        FILE *f;
        snprintf(path, sizeof path, "%s/%s", home, names[i]);
        f = fopen(path, "w");
        if (!f) abort();
        if (i < 2)
            fprintf(f, "machine 127.0.0.1 login evil password other\n"
                       "machine localhost login evil password other\n"
                       "default login evil password other\n");
        else
            fprintf(f,
                    "proxy = http://127.0.0.1:%d\nlocation\n"
                    "user = evil:other\nheader = \"X-Evil: 1\"\n",
                    port);
        fclose(f);
        chmod(path, 0600);
    }
    setenv("HOME", home, 1);
    setenv("CURL_HOME", home, 1);
    snprintf(path, sizeof path, "%s/.netrc", home);
    setenv("NETRC", path, 1);
}

static void home_drop(const char *before)
{
    static const char *const names[] = { ".netrc", "_netrc", ".curlrc",
                                         ".config/curlrc", ".config" };
    char path[128];
    size_t i;

    for (i = 0; i < 5; i++) {
        snprintf(path, sizeof path, "%s/%s", home, names[i]);
        remove(path);
    }
    CHECK_INT(rmdir(home), 0);
    unsetenv("CURL_HOME");
    unsetenv("NETRC");
    if (before)
        setenv("HOME", before, 1);
    else
        unsetenv("HOME");
}

/* http:// by address and by name, and unix: sockets, with and without a key:
 * nobody but the server is connected to, and no other credentials go out. */
TEST_ON_NET(fault_110_environment)
{
    static const char *const proxies[] = { "http://127.0.0.1:%d",
                                           "http://evil:other@127.0.0.1:%d/",
                                           "127.0.0.1:%d",
                                           "socks5h://127.0.0.1:%d" };
    const char *was = getenv("HOME");
    char *old_home = was ? strdup(was) : NULL;
    server_script bait = script(CLEAN, SERVER_CLOSE);
    size_t i;
    int how, key;

    for (i = 0; i < 4; i++)
        for (how = 0; how < 3; how++)
            for (key = 0; key < 2; key++) {
                server_script s = script(CLEAN, SERVER_CLOSE);
                int fds = open_fds(), before = test_failures_here;
                server *proxy = server_start(&bait, 1), *local = NULL;
                char base[160], path[96], v[64];
                trial t;

                REQUIRE(proxy);
                home_make(server_port(proxy));
                set_proxies(proxies[i], server_port(proxy));
                trial_begin(&t, transport, &s, 1);
                if (how == 1) {
                    snprintf(base, sizeof base, "http://localhost:%d/v1",
                             server_port(t.server));
                    t.cd.base_url = base;
                }
                if (how == 2) {
                    snprintf(path, sizeof path, "%s.sock", home);
                    local = server_start_unix(path, &s, 1);
                    REQUIRE(local);
                    server_stop(t.server);
                    t.server = local;
                    t.cd.base_url = server_base(local);
                }
                if (!key) t.cd.api_key = "";
                t.fds = fds;
                t.no_clean = true;
                trial_open(&t);
                trial_ask(&t);
                trial_finish(&t, "start|clean|end", LLMCB_OK);
                CHECK_INT(server_requests(t.server), 1);
                CHECK_INT(server_connections(proxy), 0);
                if (key) {
                    check_told(t.server, 0);
                } else if (server_request(t.server, 0)) {
                    CHECK(!server_header(server_request(t.server, 0),
                                         "Authorization", v, sizeof v));
                }
                if (server_request(t.server, 0)) {
                    const char *head = server_request(t.server, 0)->head;
                    CHECK(!strstr(head, "evil") && !strstr(head, "Evil"));
                    CHECK(!strstr(head, "Proxy"));
                }
                server_stop(proxy);
                trial_end(&t);
                set_proxies(NULL, 0);
                home_drop(old_home);
                if (before != test_failures_here)
                    TEST_FAIL("proxy %lu, address %d, key %d", (unsigned long)i,
                              how, key);
            }
    free(old_home);
}

#ifndef LLMCB_NO_CURL
/* https:// goes through a proxy that the environment names, and all it is
 * told is where to. */
TEST(fault_110_proxy_for_https_curl)
{
    static const char *const names[] = { "https_proxy", "HTTPS_PROXY",
                                         "all_proxy", "ALL_PROXY" };
    size_t i;

    for (i = 0; i < 4; i++) {
        server_script s[2] = {
            script("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
                   SERVER_CLOSE),
            script(CLEAN, SERVER_CLOSE)
        };
        char plain[64], url[64];
        trial t;

        trial_begin(&t, CURL_T, s, 2);
        snprintf(plain, sizeof plain, "%s", t.cd.base_url);
        snprintf(url, sizeof url, "http://127.0.0.1:%d", server_port(t.server));
        setenv(names[i], url, 1);
        t.cd.base_url = "https://api.invalid/v1";
        trial_open(&t);
        trial_ask(&t);
        trial_wait(&t);
        trial_check(&t, NULL);
        CHECK(llmcb_op_code(t.op) != LLMCB_OK);
        CHECK_INT(server_requests(t.server), 1);
        CHECK(!told_secret(t.server));
        if (server_request(t.server, 0))
            CHECK(strncmp(server_request(t.server, 0)->head,
                          "CONNECT api.invalid:443 ", 24) == 0);
        unsetenv(names[i]);
        llmcb_op_free(t.op);
        t.op = NULL;
        llmcb_chat_free(t.chat);
        t.cd.base_url = plain;
        t.chat = llmcb_chat_new(t.loop, &t.cd);
        trial_end(&t);
    }
}
#endif

/* ---- texts --------------------------------------------------------------- */

/* A server that says again what it was sent, wherever that can be shown. */
static void echoes(int transport, const llmcb_pair *header)
{
    static const char *const answers[] = {
        "HTTP/1.1 401 " KEY "\r\nContent-Type: application/json\r\n"
        "x-request-id: " KEY "\r\nConnection: close\r\n\r\n"
        "{\"error\":{\"message\":\"key " KEY " is bad\",\"type\":\"" KEY
        "\",\"code\":\"" KEY "\"}}",
        "HTTP/1.1 400 X\r\nConnection: close\r\n\r\nBearer " KEY,
        SSE "x-request-id: " KEY "\r\n\r\ndata: {\"error\":{\"message\":\"" KEY
            "\",\"type\":\"" KEY "\",\"code\":\"" KEY "\"}}\n\n",
        SSE "\r\nevent: error\ndata: " KEY "\n\n",
        OK "Content-Type: " KEY "\r\nContent-Encoding: " KEY
           "\r\nConnection: close\r\n\r\n" KEY,
        "HTTP/1.1 302 X\r\nLocation: http://" KEY ".invalid/" KEY "?" KEY
        "\r\nContent-Length: 0\r\n\r\n",
        SSE "\r\ndata: " KEY "\n\n",
        KEY "\r\n\r\n",
        OK KEY "\r\n\r\n",
        OK KEY ": \x01\r\n\r\n",
        SSE "Transfer-Encoding: chunked\r\n\r\n" KEY "\r\n",
        SSE "Content-Length: " KEY "\r\n\r\n",
        SSE "Transfer-Encoding: " KEY "\r\n\r\n",
        "HTTP/1.1 429 X\r\nRetry-After: " KEY "\r\nContent-Length: 0\r\n\r\n"
    };
    size_t i;

    for (i = 0; i < sizeof answers / sizeof *answers; i++) {
        server_script s[2] = { script(answers[i], SERVER_CLOSE),
                               script(CLEAN, SERVER_CLOSE) };
        int before = test_failures_here;
        trial t;

        trial_begin(&t, transport, s, 2);
        if (header) {
            t.cd.api_key = "";
            t.cd.headers = header;
            t.cd.n_headers = 1;
        }
        trial_open(&t);
        trial_ask(&t);
        trial_wait(&t);
        trial_check(&t, NULL); /* looks for it in all texts */
        CHECK(llmcb_op_code(t.op) != LLMCB_OK);
        trial_end(&t);
        if (before != test_failures_here)
            TEST_FAIL("answer %lu", (unsigned long)i);
    }
}

TEST_ON_ALL(echoes_of_the_key_are_not_repeated)
{
    echoes(transport, NULL);
}

/* As Azure and others have it. */
TEST_ON_ALL(echoes_of_a_header_are_not_repeated)
{
    static const llmcb_pair header = { "api-key", KEY };

    echoes(transport, &header);
}

/* A server says the key again without the word before it. */
TEST_ON_ALL(echoes_of_a_bearer_are_not_repeated)
{
    static const llmcb_pair header = { "Authorization", "Bearer " KEY };

    echoes(transport, &header);
}

/* That key may be shorter than it is with the word. */
TEST_ON_ALL(a_short_bearer_is_not_repeated)
{
    static const llmcb_pair header = { "Authorization", "Bearer k3y-of-9x" };
    server_script s[2] = {
        script("HTTP/1.1 401 X\r\nConnection: close\r\n\r\n"
               "{\"error\":{\"message\":\"key k3y-of-9x is bad\"}}",
               SERVER_CLOSE),
        script(CLEAN, SERVER_CLOSE)
    };
    trial t;

    trial_begin(&t, transport, s, 2);
    t.cd.api_key = "";
    t.cd.headers = &header;
    t.cd.n_headers = 1;
    trial_open(&t);
    trial_ask(&t);
    trial_wait(&t);
    CHECK(!strstr(llmcb_op_error(t.op)->message, "k3y"));
    trial_end(&t);
}

/* What hides a key may look like it. */
TEST_ON_ALL(key_of_stars)
{
    server_script s[2] = {
        script("HTTP/1.1 401 X\r\nConnection: close\r\n\r\n"
               "{\"error\":{\"message\":\"key ******** is bad\"}}",
               SERVER_CLOSE),
        script(CLEAN, SERVER_CLOSE)
    };
    trial t;

    trial_begin(&t, transport, s, 2);
    t.cd.api_key = "********";
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|error:EHTTP", LLMCB_EHTTP);
    CHECK(strstr(llmcb_op_error(t.op)->message, "key ******** is bad"));
    trial_end(&t);
}

/* ---- memory -------------------------------------------------------------- */

/* A heap that moves every block at every change and looks at what is given
 * back. */
typedef struct vault {
    heap h;
    long leaks;
} vault;

static void *vault_resize(void *user, void *ptr, size_t old, size_t size)
{
    vault *v = (vault *)user;
    size_t len = strlen(KEY), i;
    char *copy = NULL;
    void *p;

    if (ptr && old >= len) { /* as it is when it goes */
        copy = (char *)malloc(old);
        if (!copy) abort();
        memcpy(copy, ptr, old);
    }
    p = heap_resize(&v->h, ptr, old, size);
    /* the server, too, had the key in memory that it gave back */
    if (p && size > old) memset((char *)p + old, 0, size - old);
    if (copy && (p || !size)) {
        for (i = 0; i + len <= old; i++)
            if (memcmp(copy + i, KEY, len) == 0) {
                pthread_mutex_lock(&v->h.m);
                v->leaks++;
                pthread_mutex_unlock(&v->h.m);
                break;
            }
    }
    free(copy);
    return p;
}

enum {
    ANSWERED,
    RETRIED,
    REFUSED,
    CANCELLED_EARLY,
    CANCELLED_LATE,
    CHAT_FIRST,
    RECORDED,
    LARGE,
    N_WIPES
};

/* One way to use the key; whether allocation `fail_at` was reached. */
static bool wipe(int way, long fail_at, bool ever)
{
    static const char failed[] =
        "HTTP/1.1 503 X\r\nretry-after-ms: 0\r\nContent-Length: 0\r\n\r\n";
    server_script s[3] = { script(failed, SERVER_KEEP),
                           script(CLEAN_KEPT, SERVER_KEEP),
                           script(CLEAN_KEPT, SERVER_KEEP) };
    char *big = NULL, file[64];
    llmcb_pair header = { "X-Also", KEY };
    bool reached;
    int i, n;
    vault v;
    trial t;

    memset(&v, 0, sizeof v);
    pthread_mutex_init(&v.h.m, NULL);
    v.h.fail_at = fail_at;
    v.h.for_ever = ever;
    if (way != RETRIED) s[0] = s[1];
    if (way == REFUSED) s[0].end = s[1].end = s[2].end = SERVER_ACCEPT_CLOSE;
    if (way == CANCELLED_LATE) {
        s[0].bytes = SSE "\r\n" TWO;
        s[0].end = SERVER_STALL;
    }
    trial_begin(&t, SOCK, s, 3);
    t.no_clean = true;
    t.ld.allocator.resize = vault_resize;
    t.ld.allocator.user = &v;
    t.cd.max_retries = 1;
    if (way == LARGE) { /* the head is not sent in one piece */
        big = (char *)malloc(300001);
        if (!big) abort();
        memset(big, 'x', 300000);
        big[300000] = '\0';
        t.cd.headers = &header;
        t.cd.n_headers = 1;
        sys_plan(SYS_send, 1, true, SYS_SHORT);
    }
    t.loop = llmcb_loop_new(&t.ld);
    t.tr = llmcb_socket_transport(t.loop);
    t.cd.transport = t.tr;
    strcpy(file, "build/security-record.http");
    if (way == RECORDED) t.cd.transport = llmcb_record_new(t.loop, t.tr, file);
    if (t.cd.transport) t.chat = llmcb_chat_new(t.loop, &t.cd);
    trial_ask(&t);
    if (way == CANCELLED_EARLY) {
        for (i = 0; i < 2; i++)
            llmcb_loop_run_once(t.loop, 0);
        llmcb_op_cancel(t.op);
    }
    for (n = 0; way == CANCELLED_LATE && n < 5000 && !llmcb_op_done(t.op) &&
                t.r[0]->events < 3;
         n++)
        trial_turn(&t);
    if (way == CANCELLED_LATE) llmcb_op_cancel(t.op);
    if (way == CHAT_FIRST) {
        llmcb_chat_free(t.chat);
        t.chat = NULL;
    }
    trial_wait(&t);
    trial_check(&t, NULL);
    llmcb_op_free(t.op);
    t.op = NULL;
    if (way <= REFUSED && t.chat) { /* on the kept connection */
        trial_forget(&t);
        trial_ask(&t);
        trial_wait(&t);
    }
    reached = v.h.calls >= fail_at && fail_at;
    v.h.fail_at = 0;
    sys_calm();
    trial_close(&t);
    CHECK_INT(v.leaks, 0);
    CHECK_INT(v.h.blocks, 0);
    CHECK(!v.h.wrong);
    pthread_mutex_destroy(&v.h.m);
    free(big);
    if (way == RECORDED) {
        remove(file);
        remove("build/security-record.segments.json");
    }
    return reached;
}

/* In whatever way it was used, and whichever allocation failed. */
TEST(key_is_wiped_when_memory_is_given_back)
{
    int way, ever;
    long i;

    for (way = 0; way < N_WIPES; way++) {
        int before = test_failures_here;

        wipe(way, 0, false);
        for (ever = 0; ever < 2; ever++)
            for (i = 1; wipe(way, i, ever != 0); i++)
                if (before != test_failures_here || i > 500) {
                    TEST_FAIL("way %d, allocation %ld", way, i);
                    return;
                }
        if (before != test_failures_here) TEST_FAIL("way %d", way);
    }
}

/* ---- limits -------------------------------------------------------------- */

typedef struct text {
    char bytes[4096];
    size_t len;
} text;

static void put(text *b, const char *format, const char *s, size_t n)
{
    while (n--)
        b->len += (size_t)snprintf(b->bytes + b->len, sizeof b->bytes - b->len,
                                   format, s);
}

#define TOOL(i, a)                                                  \
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{" \
    "\"index\":" i ",\"id\":\"i%s\",\"function\":{\"name\":\"f\","  \
    "\"arguments\":\"" a "\"}}]}}]}\n\n"
#define HEAD SSE "Connection: close\r\n"

/* Answers that need n of something, n above 20. */
static void need_line(text *b, size_t n)
{
    put(b, "%s", HEAD "A: ", 1);
    put(b, "%s", "x", n - 5); /* with the line's end */
    put(b, "%s", "\r\n\r\n" EV("a") DONE, 1);
}

static void need_block(text *b, size_t n)
{
    size_t fixed = strlen(HEAD "\r\n") + strlen("A: \r\n");

    put(b, "%s", HEAD "A: ", 1);
    put(b, "%s", "x", n - fixed);
    put(b, "%s", "\r\n\r\n" EV("a") DONE, 1);
}

static void need_fields(text *b, size_t n)
{
    put(b, "%s", HEAD, 1);
    put(b, "%s", "A: x\r\n", n - 2);
    put(b, "%s", "\r\n" EV("a") DONE, 1);
}

static void need_event(text *b, size_t n)
{
    size_t fixed = strlen(EV("")) - 2;

    put(b, "%s",
        HEAD "\r\ndata: {\"choices\":[{\"index\":0,\"delta\":{"
             "\"content\":\"",
        1);
    put(b, "%s", "x", n - fixed);
    put(b, "%s", "\"}}]}\n\n" DONE, 1);
}

static void need_text(text *b, size_t n)
{
    put(b, "%s", HEAD "\r\n", 1);
    put(b, "%s", EV("x"), n);
    put(b, "%s", DONE, 1);
}

static void need_arguments(text *b, size_t n)
{
    put(b, "%s", HEAD "\r\n", 1);
    put(b, TOOL("0", ""), "0", 1);
    put(b, "%s",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":"
        "[{\"index\":0,\"function\":{\"arguments\":\"",
        1);
    put(b, "%s", "7", n);
    put(b, "%s", "\"}}]}}]}\n\n" DONE, 1);
}

static void need_tool_calls(text *b, size_t n)
{
    char i[24];
    size_t k;

    put(b, "%s", HEAD "\r\n", 1);
    for (k = 0; k < n; k++) {
        snprintf(i, sizeof i, "%lu", (unsigned long)k);
        put(b, "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":%s,",
            i, 1);
        put(b, "\"id\":\"%s\",\"function\":{\"name\":\"f\"}}]}}]}\n\n", i, 1);
    }
    put(b, "%s", FIN DONE, 1);
}

/* All of one call, as nothing tells them apart. */
static void need_tool_pieces(text *b, size_t n)
{
    put(b, "%s", HEAD "\r\ndata: {\"choices\":[{\"delta\":{\"tool_calls\":[{}",
        1);
    put(b, "%s", ",{}", n - 1);
    put(b, "%s", "]}}]}\n\n" DONE, 1);
}

static void need_choices(text *b, size_t n)
{
    char i[24];

    snprintf(i, sizeof i, "%lu", (unsigned long)n - 1);
    put(b, "%s", HEAD "\r\n", 1);
    put(b,
        "data: {\"choices\":[{\"index\":%s,\"delta\":{\"content\":\"x\"}"
        "}]}\n\n" DONE,
        i, 1);
}

/* All are the first one: they say so, or have no number. */
static void need_elements(text *b, size_t n)
{
    put(b, "%s", HEAD "\r\ndata: {\"choices\":[{\"delta\":{}}", 1);
    put(b, "%s", ",{\"index\":0,\"delta\":{}}", n - 1);
    put(b, "%s", "]}\n\n" DONE, 1);
}

static void need_elements_of_json(text *b, size_t n)
{
    put(b, "%s",
        OK "Content-Type: application/json\r\nConnection: close\r\n\r\n"
           "{\"choices\":[{\"message\":{}}",
        1);
    put(b, "%s", ",{\"index\":0,\"message\":{}}", n - 1);
    put(b, "%s", "]}", 1);
}

static void need_body(text *b, size_t n)
{
    put(b, "%s", HEAD "\r\n" EV("x") ":", 1);
    put(b, "%s", "x", n - strlen(EV("x") ":\n" DONE));
    put(b, "%s", "\n" DONE, 1);
}

typedef struct limit {
    const char *name;
    size_t at, n;
    void (*need)(text *b, size_t n);
} limit;

#define LIMIT(member, n) #member, offsetof(llmcb_limits, member), n
static const limit limits[] = { { LIMIT(header_line, 60), need_line },
                                { LIMIT(header_block, 200), need_block },
                                { LIMIT(header_fields, 24), need_fields },
                                { LIMIT(event, 200), need_event },
                                { LIMIT(text, 30), need_text },
                                { LIMIT(arguments, 30), need_arguments },
                                { LIMIT(tool_calls, 21), need_tool_calls },
                                { LIMIT(tool_calls, 21), need_tool_pieces },
                                { LIMIT(choices, 21), need_choices },
                                { LIMIT(choices, 21), need_elements },
                                { LIMIT(choices, 21), need_elements_of_json },
                                { LIMIT(body, 300), need_body } };

/* One less than the limit, the limit, one more. */
TEST_ON_ALL(limits_from_both_sides)
{
    size_t i;
    int more;

    for (i = 0; i < sizeof limits / sizeof *limits; i++)
        for (more = -1; more <= 1; more++) {
            const limit *l = &limits[i];
            int before = test_failures_here;
            server_script s[2];
            char name[64];
            text b;
            trial t;

            memset(&b, 0, sizeof b);
            l->need(&b, l->n + (size_t)(more + 1) - 1);
            s[0] = script(b.bytes, SERVER_CLOSE);
            s[1] = script(CLEAN, SERVER_CLOSE);
            trial_begin(&t, transport, s, 2);
            t.unsure = true; /* the limit holds for the clean one too */
            memcpy((char *)&t.cd.limits + l->at, &l->n, sizeof l->n);
            trial_open(&t);
            trial_ask(&t);
            trial_wait(&t);
            trial_check(&t, NULL);
            CHECK_STR(llmcb_code_name(llmcb_op_code(t.op)),
                      more > 0 ? "LLMCB_ELIMIT" : "LLMCB_OK");
            snprintf(name, sizeof name, "limits.%s", l->name);
            if (more > 0) CHECK(strstr(llmcb_op_error(t.op)->message, name));
            memset(&t.cd.limits, 0, sizeof t.cd.limits);
            trial_end(&t);
            if (before != test_failures_here)
                TEST_FAIL("row %lu, limits.%s, %+d", (unsigned long)i, l->name,
                          more);
        }
}

/* The windows hold back and lose nothing: while the worker is held at the
 * first token, no more than that waits for it. */
TEST_ON_ALL(windows_from_both_sides)
{
    enum { N = 200 };
    static char bytes[N * 100];
    size_t n;
    int of_bytes, i;

    for (n = 1; n <= 4; n++)
        for (of_bytes = 0; of_bytes < 2; of_bytes++) {
            static gate g;
            const gate fresh = GATE;
            server_script s[2];
            char *at = bytes;
            unsigned seen;
            trial t;

            at += sprintf(at, "%s", HEAD "\r\n");
            for (i = 0; i < N; i++)
                at += sprintf(at, "%s", EV("xyz"));
            sprintf(at, "%s", DONE);
            s[0] = script(bytes, SERVER_CLOSE);
            s[1] = script(CLEAN, SERVER_CLOSE);
            g = fresh;
            trial_begin(&t, transport, s, 2);
            if (of_bytes)
                t.cd.limits.window_bytes = 3 * n;
            else
                t.cd.limits.window_events = n;
            t.r[2]->gate = &g;
            t.r[2]->gate_kind = LLMCB_LLM_NEW_TOKEN;
            trial_open(&t);
            trial_ask(&t);
            while (!gate_came(&g) && !sys.hung)
                llmcb_loop_run_once(t.loop, 1);
            for (i = 0; i < 100; i++)
                llmcb_loop_run_once(t.loop, 0);
            seen = t.r[0]->events - 1; /* tokens; the start is done */
            /* bytes are those of whole records, and one may be begun */
            if (of_bytes ? !seen || seen > n + 1 : seen != n)
                TEST_FAIL("%u tokens in a window of %lu%s", seen,
                          (unsigned long)n, of_bytes ? " times 3 bytes" : "");
            gate_let(&g, EVERYBODY);
            trial_finish(&t, NULL, LLMCB_OK);
            CHECK_INT(count_of(t.r[2]->log, "|xyz"), N);
            t.r[2]->gate = NULL;
            trial_end(&t);
        }
}

/* ---- descriptors and signals --------------------------------------------- */

/* While a stream is under way, what a program that is executed would get. */
TEST_ON_ALL(descriptors_are_not_inherited)
{
    server_segment hold = { strlen(SSE "Connection: close\r\n\r\n" EV("Hel")),
                            transport == REPLAY ? 1000 : SERVER_HOLD };
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    bool before[512];
    int fd, ours = 0, others = 0;
    trial t;

    s[0].segments = &hold;
    s[0].n_segments = 1;
    for (fd = 0; fd < 512; fd++)
        before[fd] = fcntl(fd, F_GETFD) >= 0;
    trial_begin(&t, transport, s, 2);
    trial_open(&t);
    trial_ask(&t);
    trial_until(&t, 2);
    for (fd = 0; fd < 512; fd++) {
        int flags = fcntl(fd, F_GETFD);
        if (before[fd] || flags < 0) continue;
        if (sys.fd[fd]) {
            ours++;
            CHECK(flags & FD_CLOEXEC);
        } else if (!(flags & FD_CLOEXEC)) {
            others++;
        }
    }
    CHECK(ours >= (transport == REPLAY ? 2 : 3));
    /* libcurl makes a pair of its own to be woken by */
    CHECK(others <= (transport == CURL_T ? 2 : 0));
    if (t.server) server_go(t.server);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    trial_end(&t);
}

static int act_mask(rec *r, const llmcb_event *ev)
{
    sigset_t set;
    int sig;

    (void)ev;
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    for (sig = 1; sig < 32; sig++)
        if (sig != SIGKILL && sig != SIGSTOP && !sigismember(&set, sig))
            r->wrong = "a signal may come to a worker";
    return 0;
}

/* Workers take no signal; the loop's thread has the mask that it had. */
TEST_ON_ALL(workers_take_no_signal)
{
    server_script s[2] = { script(HELLO, SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    sigset_t before, after;
    trial t;
    int sig;

    pthread_sigmask(SIG_BLOCK, NULL, &before);
    trial_begin(&t, transport, s, 2);
    t.r[2]->act = act_mask;
    trial_open(&t);
    trial_ask(&t);
    trial_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    pthread_sigmask(SIG_BLOCK, NULL, &after);
    for (sig = 1; sig < 32; sig++)
        CHECK_INT(sigismember(&after, sig), sigismember(&before, sig));
    trial_end(&t);
}

int main(int argc, char **argv)
{
    set_proxies(NULL, 0);
    return scene_main(argc, argv);
}
