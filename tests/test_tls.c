/* TLS with the libcurl transport: nginx in front of the scripted server,
 * with certificates of an authority of our own, good ones and bad ones. */
#include "impl.h"
#include "server.h"
#include "test.h"
#ifndef LLMCB_NO_CURL
#include <curl/curl.h>
#endif
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#define KEY "sk-canary-0123456789"
#define JOKE \
    "Why don't scientists trust atoms? \n\nBecause they make up everything."

/* One port of nginx each. */
enum { GOOD, SELF_SIGNED, WRONG_NAME, EXPIRED, PLAIN, HTTP2, N_PORTS };

static char dir[512], ca[600];
static int ports[N_PORTS];
static pid_t nginx = -1;
static server *behind, *stalling; /* the second, below /stall, never ends */

/* argv ends with NULL. */
static pid_t spawn(const char *const *argv, const char *log)
{
    pid_t pid = fork();

    if (pid == 0) {
        int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);

        if (fd >= 0) {
            dup2(fd, 1);
            dup2(fd, 2);
        }
#ifdef __linux__
        /* A test program that is killed leaves nothing behind. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
        execvp(argv[0], (char *const *)argv);
        _exit(127);
    }
    return pid;
}

static int run(const char *const *argv, const char *log)
{
    int status = -1;
    pid_t pid = spawn(argv, log);

    if (pid < 0) return -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int shell(const char *script)
{
    const char *argv[] = { "sh", "-c", script, "sh", dir, NULL };
    char log[600];

    snprintf(log, sizeof log, "%s/log", *dir ? dir : "build");
    return run(argv, log);
}

/* `openssl ca` because it is the one way to an expired certificate that all
 * versions have. */
static const char certificates[] =
    "set -e; cd \"$1\"; : >index.txt; echo 01 >serial; mkdir new\n"
    "cat >ca.cnf <<'END'\n"
    "[ca]\n"
    "default_ca = here\n"
    "[here]\n"
    "dir = .\n"
    "database = index.txt\n"
    "new_certs_dir = new\n"
    "serial = serial\n"
    "certificate = ca.pem\n"
    "private_key = ca.key\n"
    "default_md = sha256\n"
    "policy = any\n"
    "unique_subject = no\n"
    "[any]\n"
    "commonName = supplied\n"
    "[req]\n"
    "distinguished_name = name\n"
    "prompt = no\n"
    "[name]\n"
    "CN = llmcb test\n"
    "[authority]\n"
    "basicConstraints = critical, CA:TRUE\n"
    "keyUsage = critical, keyCertSign, cRLSign\n"
    "subjectKeyIdentifier = hash\n"
    "[here_names]\n"
    "basicConstraints = CA:FALSE\n"
    "subjectAltName = DNS:localhost, IP:127.0.0.1\n"
    "[other_names]\n"
    "basicConstraints = CA:FALSE\n"
    "subjectAltName = DNS:other.invalid\n"
    "END\n"
    "key() { openssl ecparam -name prime256v1 -genkey -noout -out $1.key; }\n"
    "now=\"-days 2\"\n"
    "past=\"-startdate 20200101000000Z -enddate 20200201000000Z\"\n"
    "key ca\n"
    "openssl req -x509 -new -config ca.cnf -extensions authority -key ca.key"
    " -days 2 -out ca.pem\n"
    "key self\n"
    "openssl req -x509 -new -config ca.cnf -extensions here_names"
    " -key self.key -days 2 -out self.pem\n"
    "sign() {\n"
    "    n=$1 names=$2; shift 2; key $n\n"
    "    openssl req -new -config ca.cnf -key $n.key -out $n.csr\n"
    "    openssl ca -batch -notext -config ca.cnf -extensions $names \"$@\""
    " -in $n.csr -out $n.pem\n"
    "}\n"
    "sign good here_names $now\n"
    "sign wrong other_names $now\n"
    "sign expired here_names $past\n";

static int write_conf(int with_all)
{
    static const char *const cert[N_PORTS] = { "good", "self", "wrong",
                                               "expired", NULL, "good" };
    char path[600];
    FILE *f;

    snprintf(path, sizeof path, "%s/nginx.conf", dir);
    f = fopen(path, "w");
    if (!f) return -1;
    /* One process, so that its end is the end of it all. */
    fprintf(f, "daemon off;\nmaster_process off;\npid %s/nginx.pid;\n"
               "error_log %s/error.log;\nevents { worker_connections 64; }\n"
               "http {\n  access_log off;\n  client_body_temp_path %s/body;\n"
               "  proxy_temp_path %s/proxy;\n", dir, dir, dir, dir);
    if (with_all) /* of modules that some builds lack */
        fprintf(f, "  fastcgi_temp_path %s/f;\n  uwsgi_temp_path %s/u;\n"
                   "  scgi_temp_path %s/s;\n", dir, dir, dir);
    fprintf(f, "  proxy_http_version 1.1;\n  proxy_buffering off;\n"
               "  proxy_set_header X-Client \"$server_protocol $connection\";\n");
    for (int i = 0; i < N_PORTS; i++) {
        fprintf(f, "  server {\n    listen 127.0.0.1:%d%s%s;\n", ports[i],
                cert[i] ? " ssl" : "", i == HTTP2 ? " http2" : "");
        if (cert[i])
            fprintf(f, "    ssl_certificate %s/%s.pem;\n"
                       "    ssl_certificate_key %s/%s.key;\n",
                    dir, cert[i], dir, cert[i]);
        fprintf(f, "    location / { proxy_pass http://127.0.0.1:%d; }\n"
                   "    location /stall/ { proxy_pass http://127.0.0.1:%d; }\n"
                   "  }\n", server_port(behind), server_port(stalling));
    }
    fprintf(f, "}\n");
    return fclose(f);
}

static int dial(int port)
{
    struct sockaddr_in a;
    int fd = socket(AF_INET, SOCK_STREAM, 0), ok;

    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_port = htons((uint16_t)port);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ok = fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0;
    if (fd >= 0) close(fd);
    return ok;
}

/* Free ones; another program may take one before nginx does. */
static int pick_ports(void)
{
    int fd[N_PORTS], ok = 1;

    for (int i = 0; i < N_PORTS; i++) {
        struct sockaddr_in a;
        socklen_t len = sizeof a;

        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fd[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (bind(fd[i], (struct sockaddr *)&a, sizeof a) != 0 ||
            getsockname(fd[i], (struct sockaddr *)&a, &len) != 0)
            ok = 0;
        ports[i] = ntohs(a.sin_port);
    }
    for (int i = 0; i < N_PORTS; i++) close(fd[i]);
    return ok;
}

/* Waits until nginx listens everywhere; 0: it ended or is too slow. */
static int nginx_is_up(void)
{
    for (int i = 0, turns = 0; i < N_PORTS; turns++) {
        struct timespec pause = { 0, 10 * 1000 * 1000 };
        int status;

        if (dial(ports[i])) {
            i++;
            continue;
        }
        if (waitpid(nginx, &status, WNOHANG) == nginx) {
            nginx = -1;
            return 0;
        }
        if (turns > 1500) return 0;
        nanosleep(&pause, NULL); /* nginx tells nobody when it is ready */
    }
    return 1;
}

static void nginx_stop(void)
{
    int status;

    if (nginx < 0) return;
    kill(nginx, SIGKILL);
    while (waitpid(nginx, &status, 0) < 0 && errno == EINTR)
        ;
    nginx = -1;
}

static const char *set_up(void)
{
    char cwd[400], conf[600], log[600], error[600];
    server_script stall;

    memset(&stall, 0, sizeof stall);
    if (shell("command -v nginx >/dev/null") != 0)
        return "nginx is not installed";
    if (shell("command -v openssl >/dev/null") != 0)
        return "openssl is not installed";
    mkdir("build", 0777);
    if (!getcwd(cwd, sizeof cwd)) return "no current directory";
    snprintf(dir, sizeof dir, "%s/build/tls-XXXXXX", cwd);
    if (!mkdtemp(dir)) {
        dir[0] = 0;
        return "build/ is not writable";
    }
    snprintf(ca, sizeof ca, "%s/ca.pem", dir);
    snprintf(conf, sizeof conf, "%s/nginx.conf", dir);
    snprintf(log, sizeof log, "%s/log", dir);
    snprintf(error, sizeof error, "%s/error.log", dir);
    if (shell(certificates) != 0) return "openssl made no certificates";
    behind = server_start_fixture("tests/fixtures/joke.http");
    stall.bytes = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
                  "data: {\"choices\":[{\"index\":0,\"delta\":"
                  "{\"content\":\"Why\"}}]}\n\n";
    stall.end = SERVER_STALL;
    stalling = server_start(&stall, 1);
    if (!behind || !stalling) return "no server";
    for (int i = 0; i < 8; i++) {
        /* -e is new, and without it a user may not write its first log:
         * a warning only. */
        const char *start[] = { "nginx", "-p", dir, "-c", conf,
                                i % 2 ? NULL : "-e", error, NULL };

        if (!pick_ports() || write_conf(i / 2 % 2 == 0) != 0) continue;
        nginx = spawn(start, log);
        if (nginx >= 0 && nginx_is_up()) return NULL;
        nginx_stop();
    }
    shell("cat error.log >>log 2>/dev/null");
    return "nginx did not start";
}

static void tear_down(void)
{
    nginx_stop();
    server_stop(behind);
    server_stop(stalling);
    if (*dir) shell("rm -rf \"$1\"");
}

/* Once for all tests; NULL: all is there. */
static const char *need(void)
{
    static const char *why;
    static int done;

    if (!done) {
        done = 1;
#ifdef LLMCB_NO_CURL
        why = "libcurl is not installed";
#else
        why = set_up();
#endif
    }
    return why;
}

#define NEED()                    \
    do {                          \
        const char *why = need(); \
        if (why) SKIP(why);       \
    } while (0)

/* ---- one call ---------------------------------------------------------- */

typedef struct outcome {
    llmcb_code code;
    llmcb_error error;
    char text[256];
    bool sentinel;
    int starts, tokens, ends, errors;
} outcome;

static int count(llmcb_handler *h, const llmcb_event *ev)
{
    outcome *o = (outcome *)h->user;

    switch (ev->kind) {
    case LLMCB_CHAT_MODEL_START:
        o->starts++;
        break;
    case LLMCB_LLM_NEW_TOKEN:
        o->tokens++;
        break;
    case LLMCB_LLM_END:
        o->ends++;
        break;
    case LLMCB_LLM_ERROR:
        o->errors++;
        break;
    default:
        break;
    }
    return 0;
}

static outcome call_with(llmcb_chat_desc *desc, const char *host, int port)
{
    outcome o;
    llmcb_handler h;
    llmcb_handler *callbacks[1];
    llmcb_message message;
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat *chat;
    llmcb_op *op;
    char base[64];

    memset(&o, 0, sizeof o);
    memset(&h, 0, sizeof h);
    memset(&message, 0, sizeof message);
    h.user = &o;
    h.sync.on_chat_model_start = h.sync.on_llm_new_token = count;
    h.sync.on_llm_end = h.sync.on_llm_error = count;
    callbacks[0] = &h;
    message.role = LLMCB_USER;
    message.content = "Tell me a joke";
    snprintf(base, sizeof base, "https://%s:%d/v1", host, port);
    desc->base_url = base;
    desc->api_key = KEY;
    desc->streaming = true;
    desc->max_retries = -1;
    desc->total_ms = 15000;
    desc->callbacks = callbacks;
    desc->n_callbacks = 1;
    chat = llmcb_chat_new(loop, desc);
    op = llmcb_chat_generate(chat, &message, 1, NULL);
    o.code = llmcb_op_wait(op);
    o.error = *llmcb_op_error(op);
    o.sentinel = llmcb_op_result(op)->sentinel;
    if (llmcb_op_result(op)->n_generations)
        snprintf(o.text, sizeof o.text, "%s",
                 llmcb_op_result(op)->generations[0].text.ptr);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    if (llmcb_loop_free(loop) != LLMCB_OK)
        TEST_FAIL("llmcb_loop_free failed");
    return o;
}

static outcome call(int port, const char *ca_file)
{
    llmcb_chat_desc desc;

    memset(&desc, 0, sizeof desc);
    desc.ca_file = ca_file;
    return call_with(&desc, "127.0.0.1", port);
}

static void check_good(const outcome *o)
{
    CHECK_INT(o->code, LLMCB_OK);
    if (o->code != LLMCB_OK) TEST_FAIL("%s", o->error.message);
    CHECK_INT(o->starts, 1);
    CHECK(o->tokens > 5);
    CHECK_INT(o->ends, 1);
    CHECK_INT(o->errors, 0);
    CHECK(o->sentinel);
    CHECK_STR(o->text, JOKE);
}

/* Refused before a byte of the request was sent. */
static void check_refused(const outcome *o, size_t requests_before)
{
    CHECK_STR(llmcb_code_name(o->code), "LLMCB_ETLS");
    CHECK_INT(o->error.code, o->code);
    CHECK(o->error.message[0] != 0);
    CHECK(!strstr(o->error.message, KEY));
    CHECK_INT(o->error.http_status, 0);
    CHECK_INT(o->starts, 1);
    CHECK_INT(o->tokens, 0);
    CHECK_INT(o->ends, 0);
    CHECK_INT(o->errors, 1);
    CHECK_INT(server_requests(behind), requests_before);
}

TEST(tls_good_certificate)
{
    outcome o;
    char auth[64];
    const server_req *r;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[GOOD], ca);
    check_good(&o);
    REQUIRE(server_requests(behind) == before + 1);
    r = server_request(behind, before);
    CHECK_STR(server_header(r, "Authorization", auth, sizeof auth),
              "Bearer " KEY);
    CHECK(strncmp(r->head, "POST /v1/chat/completions HTTP/1.1", 34) == 0);
    CHECK(strstr(r->body, "Tell me a joke") != NULL);
}

TEST(tls_good_certificate_by_name)
{
    llmcb_chat_desc desc;
    outcome o;

    NEED();
    memset(&desc, 0, sizeof desc);
    desc.ca_file = ca;
    o = call_with(&desc, "localhost", ports[GOOD]);
    check_good(&o);
}

TEST(tls_http2_is_not_offered)
{
    llmcb_chat_desc desc;
    outcome o;

    NEED();
    memset(&desc, 0, sizeof desc);
    desc.ca_file = ca;
    desc.http2 = true; /* nginx here offers 1.1 only: must still do */
    o = call_with(&desc, "127.0.0.1", ports[GOOD]);
    check_good(&o);
}

/* What nginx says of a request's client: protocol and connection. */
static void client_of(server *s, size_t request, char *buf, size_t cap)
{
    const server_req *r = server_request(s, request);

    buf[0] = '\0';
    if (r) server_header(r, "X-Client", buf, cap);
}

static llmcb_chat *http2_chat(llmcb_loop *loop, const char *path)
{
    llmcb_chat_desc desc;
    char base[80];

    snprintf(base, sizeof base, "https://127.0.0.1:%d%s/v1", ports[HTTP2],
             path);
    memset(&desc, 0, sizeof desc);
    desc.base_url = base;
    desc.api_key = KEY;
    desc.ca_file = ca;
    desc.http2 = true;
    desc.streaming = true;
    desc.max_retries = -1;
    desc.total_ms = 15000;
    return llmcb_chat_new(loop, &desc);
}

static void check_joke(llmcb_op *op)
{
    const llmcb_result *r;

    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    r = llmcb_op_result(op);
    CHECK(r->sentinel);
    REQUIRE(r->n_generations == 1);
    CHECK_STR(r->generations[0].text.ptr, JOKE);
    llmcb_op_free(op);
}

/* Three streams on one connection: one that stays open, one beside it, and
 * one after the first was cancelled, which ends that stream and no other. */
TEST(tls_http2)
{
    llmcb_message message;
    llmcb_loop *loop;
    llmcb_chat *chat, *stalled;
    llmcb_op *open, *op;
    const llmcb_chunk *chunk;
    char first[64], other[64];
    size_t before, stalls;

    NEED();
#ifndef LLMCB_NO_CURL
    if (!(curl_version_info(CURLVERSION_NOW)->features & CURL_VERSION_HTTP2))
        SKIP("libcurl was built without HTTP/2");
#endif
    memset(&message, 0, sizeof message);
    message.role = LLMCB_USER;
    message.content = "Tell me a joke";
    before = server_requests(behind);
    stalls = server_requests(stalling);
    loop = llmcb_loop_new(NULL);
    chat = http2_chat(loop, "");
    stalled = http2_chat(loop, "/stall");
    open = llmcb_chat_stream(stalled, &message, 1, NULL);
    REQUIRE(llmcb_op_next(open, &chunk));
    CHECK_STR(chunk->text.ptr, "Why");
    check_joke(llmcb_chat_generate(chat, &message, 1, NULL));
    CHECK(!llmcb_op_done(open));
    llmcb_op_cancel(open);
    CHECK_INT(llmcb_op_wait(open), LLMCB_ECANCELLED);
    llmcb_op_free(open);
    op = llmcb_chat_generate(chat, &message, 1, NULL);
    check_joke(op);
    CHECK_INT(server_requests(behind), before + 2);
    client_of(stalling, stalls, first, sizeof first);
    CHECK(strncmp(first, "HTTP/2.0 ", 9) == 0);
    client_of(behind, before, other, sizeof other);
    CHECK_STR(other, first);
    client_of(behind, before + 1, other, sizeof other);
    CHECK_STR(other, first);
    llmcb_chat_free(chat);
    llmcb_chat_free(stalled);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

TEST(tls_unknown_authority)
{
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[GOOD], NULL);
    check_refused(&o, before);
}

TEST(tls_self_signed)
{
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[SELF_SIGNED], ca);
    check_refused(&o, before);
}

TEST(tls_wrong_name)
{
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[WRONG_NAME], ca);
    check_refused(&o, before);
}

TEST(tls_expired)
{
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[EXPIRED], ca);
    check_refused(&o, before);
}

TEST(tls_ca_file_missing)
{
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[GOOD], "build/no/such/file.pem");
    CHECK(o.code != LLMCB_OK);
    CHECK_INT(o.tokens, 0);
    CHECK_INT(server_requests(behind), before);
}

/* This program has no LLMCB_ALLOW_INSECURE_TLS. */
TEST(tls_insecure_is_not_compiled_in)
{
    llmcb_chat_desc desc;
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    memset(&desc, 0, sizeof desc);
    desc.insecure_tls = true;
    o = call_with(&desc, "127.0.0.1", ports[SELF_SIGNED]);
    CHECK(o.code != LLMCB_OK);
    CHECK_INT(o.tokens, 0);
    CHECK_INT(server_requests(behind), before);
}

TEST(tls_plain_http_by_nginx)
{
    outcome o;
    size_t before;

    NEED();
    before = server_requests(behind);
    o = call(ports[PLAIN], ca);
    check_refused(&o, before);
}

TEST(tls_plain_http_at_once)
{
    server_script script;
    server *s;
    outcome o;

    NEED();
    memset(&script, 0, sizeof script);
    script.bytes = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    script.end = SERVER_CLOSE;
    script.at_accept = 1;
    s = server_start(&script, 1);
    REQUIRE(s != NULL);
    o = call(server_port(s), ca);
    check_refused(&o, server_requests(behind));
    CHECK_INT(server_requests(s), 0);
    server_stop(s);
}

TEST(tls_handshake_stalls)
{
    llmcb_chat_desc desc;
    server_script script;
    server *s;
    outcome o;

    NEED();
    memset(&script, 0, sizeof script);
    script.end = SERVER_STALL;
    script.at_accept = 1;
    s = server_start(&script, 1);
    REQUIRE(s != NULL);
    memset(&desc, 0, sizeof desc);
    desc.ca_file = ca;
    desc.connect_ms = 300;
    o = call_with(&desc, "127.0.0.1", server_port(s));
    CHECK_STR(llmcb_code_name(o.code), "LLMCB_ETIMEDOUT");
    CHECK_INT(o.error.detail, LLMCB_DETAIL_CONNECT);
    CHECK_INT(o.errors, 1);
    CHECK(server_wait_closed(s, 0) != SERVER_OPEN);
    server_stop(s);
}

TEST(tls_two_calls_one_after_the_other)
{
    outcome o;

    NEED();
    o = call(ports[EXPIRED], ca);
    CHECK_STR(llmcb_code_name(o.code), "LLMCB_ETLS");
    o = call(ports[GOOD], ca);
    check_good(&o);
}

int main(int argc, char **argv)
{
    static const char *const names[] = {
        "http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE"
    };
    int result;
    char *end = getenv("PATH");
    char path[4096];

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
    snprintf(path, sizeof path, "%s:/usr/sbin:/usr/local/sbin", end ? end : "");
    setenv("PATH", path, 1);
    result = test_main(argc, argv);
    tear_down();
    return result;
}
