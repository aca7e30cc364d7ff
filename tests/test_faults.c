/* Sections B to F of the fault catalogue (rows 11 to 95): a server that
 * answers wrongly, on the three transports. Two tables have what is one
 * answer, and what is a failed try; each row of them is a test of its own,
 * of this name with the transport behind it. What needs more is a function
 * further down.
 *
 * What is asserted after each is T1 to T9, in trial.h, and that the text of
 * the result is what the tokens say. Nothing here measures time: the clock
 * that the library sees is moved by hand. */
#include "trial.h"

/* ---- bytes --------------------------------------------------------------- */

typedef struct bytes {
    char *p;
    size_t len, cap;
} bytes;

static void put(bytes *b, const void *p, size_t len)
{
    b->p = server_grow(b->p, b->len + len, &b->cap, 1);
    if (b->cap <= b->len + len) abort();
    if (len) memcpy(b->p + b->len, p, len);
    b->len += len;
    b->p[b->len] = 0;
}

static void puts_to(bytes *b, const char *s)
{
    put(b, s, strlen(s));
}

static void fill(bytes *b, char c, size_t n)
{
    char block[4096];

    memset(block, c, sizeof block);
    for (; n > sizeof block; n -= sizeof block) put(b, block, sizeof block);
    put(b, block, n);
}

static void put_chunk(bytes *b, const char *p, size_t len)
{
    char size[32];

    snprintf(size, sizeof size, "%lx\r\n", (unsigned long)len);
    puts_to(b, size);
    put(b, p, len);
    puts_to(b, "\r\n");
}

/* ---- what the handlers of a trial saw, beside their logs ----------------- */

typedef struct seen {
    char text[8192]; /* choice 0, of the tokens */
    size_t len;
    bool complete, sentinel, differs;
    llmcb_error error;
    size_t n_retries;
    llmcb_error failed[8]; /* the tries */
    int64_t delay[8];
    int attempt[8];
} seen;

static seen saw[3];

static int act_see(rec *r, const llmcb_event *ev)
{
    seen *s = (seen *)r->user;

    if (ev->start) memset(s, 0, sizeof *s);
    if (ev->token && ev->token->choice == 0 &&
        s->len + ev->token->text.len <= sizeof s->text) {
        memcpy(s->text + s->len, ev->token->text.ptr, ev->token->text.len);
        s->len += ev->token->text.len;
    }
    if (ev->retry && s->n_retries < 8) {
        s->failed[s->n_retries] = *ev->retry->error;
        s->delay[s->n_retries] = ev->retry->delay_ms;
        s->attempt[s->n_retries++] = ev->retry->attempt;
    }
    if (ev->error) s->error = *ev->error;
    if (ev->result) {
        llmcb_str text = { "", 0 };
        if (ev->result->n_generations) text = ev->result->generations[0].text;
        s->differs = text.len != s->len ||
                     memcmp(text.ptr, s->text, s->len) != 0;
        s->complete = ev->result->complete;
        s->sentinel = ev->result->sentinel;
    }
    return 0;
}

static void fault_begin(trial *t, int transport, const server_script *s,
                        size_t n)
{
    size_t i;

    trial_begin(t, transport, s, n);
    memset(saw, 0, sizeof saw);
    for (i = 0; i < 3; i++) {
        t->r[i]->act = act_see;
        t->r[i]->user = &saw[i];
    }
}

static void fault_finish(trial *t, const char *log, llmcb_code code)
{
    size_t i;

    trial_finish(t, log, code);
    for (i = 0; i < 3; i++) {
        if (!t->r[i]->starts) continue;
        CHECK(!saw[i].differs);
        CHECK_INT(saw[i].complete, code == LLMCB_OK);
        CHECK_INT(saw[i].error.code, code);
        if (code != LLMCB_ECANCELLED) /* it skips what was not handed out */
            CHECK(memcmp(saw[i].delay, saw[0].delay, sizeof saw[i].delay) ==
                  0);
        check_no_canary(&saw[i].error);
    }
}

/* The usual: this answer, then the clean one. */
static void fault_start(trial *t, int transport, server_script bad)
{
    server_script s[2] = { bad, script(CLEAN, SERVER_CLOSE) };

    fault_begin(t, transport, s, 2);
    trial_open(t);
    trial_ask(t);
}

/* The same with a border at which the server waits, or the clock goes on. */
static server_script held(const char *bytes, server_end end,
                          const server_segment *at, size_t n)
{
    server_script s = script(bytes, end);

    s.segments = at;
    s.n_segments = n;
    return s;
}

static server_segment hold(size_t offset)
{
    server_segment s = { offset, SERVER_HOLD };

    return s;
}

/* Another call on the same loop. */
static void fault_again(trial *t)
{
    llmcb_op_free(t->op);
    trial_forget(t);
    trial_ask(t);
}

/* ---- answers ------------------------------------------------------------- */

#define CHUNKED SSE "Transfer-Encoding: chunked\r\n\r\n"
#define DELTA(members) \
    "data: {\"choices\":[{\"index\":0,\"delta\":{" members "}}]}\n\n"
#define CHOICE(i, t)                                                 \
    "data: {\"choices\":[{\"index\":" #i ",\"delta\":{\"content\":\"" t \
    "\"}}]}\n\n"
#define FIN_OF(i, r)                                                   \
    "data: {\"choices\":[{\"index\":" #i ",\"delta\":{},\"finish_reason\":\"" \
    r "\"}]}\n\n"
#define ALL TWO FIN DONE
#define TWO_TOKENS "Hel|lo|"
#define ALL_TOKENS "Hel|lo||"
#define COMPLETION                                                        \
    "{\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":" \
    "{\"role\":\"assistant\",\"content\":\"Hello\"},\"finish_reason\":"    \
    "\"stop\"}]}"

/* How `head` and `body` of a row become bytes. */
typedef enum framing {
    RAW,     /* one behind the other */
    CHUNK,   /* chunked, a chunk an event, whole */
    CUT,     /* likewise, without the last chunk */
    LENGTH,  /* with its Content-Length */
    TO_CLOSE /* until the connection closes */
} framing;

/* Codes that libcurl makes of it. The row's own: 0. */
#define CURL_OK 1
#define CURL_NO 2 /* it shows something else, or nothing */

#define NEW_CONN 1u /* the next request needs a new connection */
#define SOCK_CONN 8u /* likewise, but libcurl may have read the surplus */
#define AT_ONCE 4u /* the surplus must not come behind the next request */
#define BIG 2u      /* too big to be split at every byte */
#define LITTLE 16u /* takes little memory */

typedef struct row {
    const char *name;
    const char *head; /* lines with CRLF; NULL: SSE */
    const char *body;
    framing frame;
    server_end end;
    void (*make)(bytes *b); /* instead of the five above but `end` */
    llmcb_code code;
    int curl;
    const char *tokens;
    const char *curl_tokens; /* NULL: the same */
    unsigned flags;
    int n; /* choices */
    void (*check)(const llmcb_result *r, const llmcb_error *e);
} row;

static void frame_body(bytes *b, const char *body, bool whole)
{
    const char *at = body, *next;

    for (; *at; at = next) {
        next = strstr(at, "\n\n");
        next = next ? next + 2 : at + strlen(at);
        put_chunk(b, at, (size_t)(next - at));
    }
    if (whole) puts_to(b, "0\r\n\r\n");
}

static bytes make_row(const row *r)
{
    bytes b = { NULL, 0, 0 };
    char length[64];
    const char *body = r->body ? r->body : "";

    put(&b, "", 0);
    if (r->make) {
        r->make(&b);
        return b;
    }
    puts_to(&b, r->head ? r->head : r->frame == RAW ? "" : SSE);
    switch (r->frame) {
    case RAW:
        puts_to(&b, body);
        break;
    case CHUNK:
    case CUT:
        puts_to(&b, "Transfer-Encoding: chunked\r\n\r\n");
        frame_body(&b, body, r->frame == CHUNK);
        break;
    case LENGTH:
        snprintf(length, sizeof length, "Content-Length: %lu\r\n\r\n",
                 (unsigned long)strlen(body));
        puts_to(&b, length);
        puts_to(&b, body);
        break;
    case TO_CLOSE:
    default:
        puts_to(&b, "\r\n");
        puts_to(&b, body);
        break;
    }
    return b;
}

/* B */
static void make_nul_header(bytes *b)
{
    puts_to(b, SSE "X-A: a");
    put(b, "", 1);
    puts_to(b, "b\r\nContent-Length: 2\r\n\r\n\n\n");
}

static void make_long_header(bytes *b, size_t n)
{
    puts_to(b, SSE "X-A: ");
    fill(b, 'a', n);
    puts_to(b, "\r\nConnection: close\r\n\r\n" ALL);
}

static void make_header_90k(bytes *b)
{
    make_long_header(b, 90000);
}

static void make_header_200k(bytes *b)
{
    make_long_header(b, 200000);
}

static void make_headers(bytes *b, size_t n, const char *line)
{
    puts_to(b, SSE);
    while (n--) puts_to(b, line);
    puts_to(b, "Connection: close\r\n\r\n" ALL);
}

static void make_headers_40000(bytes *b)
{
    make_headers(b, 40000, "X-A: a\r\n");
}

static void make_interims(bytes *b, size_t n)
{
    while (n--) puts_to(b, "HTTP/1.1 100 Continue\r\n\r\n");
    puts_to(b, SSE "Connection: close\r\n\r\n" ALL);
}

static void make_interims_2000(bytes *b)
{
    make_interims(b, 2000);
}

static void make_interims_9(bytes *b)
{
    make_interims(b, 9);
}

static void make_interims_8(bytes *b)
{
    make_interims(b, 8);
}

/* C */
static void make_400_10mb(bytes *b)
{
    puts_to(b, "HTTP/1.1 400 Bad Request\r\nContent-Length: 10000000\r\n\r\n");
    fill(b, 'x', 10000000);
}

/* D */
static void make_ext(bytes *b, size_t n)
{
    puts_to(b, CHUNKED "5;");
    fill(b, 'e', n);
    puts_to(b, "\r\n: a\n\n\r\n");
    frame_body(b, ALL, true);
}

static void make_ext_1mb(bytes *b)
{
    make_ext(b, 1000000);
}

static void make_ext_256(bytes *b)
{
    make_ext(b, 256);
}

static void make_ext_257(bytes *b)
{
    make_ext(b, 257);
}

static void make_tiny_chunks(bytes *b)
{
    int i;

    puts_to(b, CHUNKED);
    for (i = 0; i < 1000000; i++) {
        const char *s = i % 50 == 0 ? ":" : i % 50 == 49 ? "\n" : "x";
        put_chunk(b, s, 1);
    }
    frame_body(b, ALL, true);
}

static void make_long_trailer(bytes *b)
{
    puts_to(b, CHUNKED);
    frame_body(b, TWO FIN, false);
    puts_to(b, "0\r\n");
    for (int i = 0; i < 1000; i++) puts_to(b, "X-T: trailer\r\n");
    puts_to(b, "\r\n");
}

static void make_gzip(bytes *b)
{
    static const char gz[] = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03";

    puts_to(b, SSE "Content-Encoding: gzip\r\nContent-Length: 10\r\n\r\n");
    put(b, gz, 10);
}

static void make_gzip_350k(bytes *b)
{
    puts_to(b, SSE "Content-Encoding: gzip\r\nContent-Length: 350000\r\n\r\n");
    put(b, "\x1f\x8b\x08", 3);
    fill(b, '\0', 350000 - 3);
}

static void make_split_response(bytes *b)
{
    puts_to(b, CHUNKED);
    frame_body(b, ALL, true);
    puts_to(b, SSE "Connection: keep-alive\r\nContent-Length: 74\r\n\r\n"
                   EV("evil") DONE);
}

/* E */
static void make_line(bytes *b, size_t n, const char *head)
{
    /* one line of n bytes behind a whole event */
    static const char tail[] = "\"}}]}";

    puts_to(b, SSE "\r\n" EV("Hel"));
    puts_to(b, head);
    fill(b, 'y', n - strlen(head) - strlen(tail));
    puts_to(b, tail);
    puts_to(b, "\n\n" FIN DONE);
}

#define LINE_HEAD(index) \
    "data: {\"choices\":[{" index "\"delta\":{\"content\":\""

static void make_line_64m(bytes *b)
{
    make_line(b, (size_t)64 << 20, LINE_HEAD(""));
}

static void make_nul_data(bytes *b)
{
    puts_to(b, SSE "\r\n" EV("Hel") "data: {\"choices\":[{\"index\":0,"
                   "\"delta\":{\"content\":\"a");
    put(b, "", 1);
    puts_to(b, "b\"}}]}\n\n" FIN DONE);
}

/* F */
static void make_brackets(bytes *b)
{
    puts_to(b, SSE "\r\n" EV("Hel") "data: ");
    fill(b, '[', 10000000);
    puts_to(b, "\n\n" DONE);
}

static void make_objects(bytes *b)
{
    puts_to(b, SSE "\r\n" EV("Hel") "data: ");
    for (int i = 0; i < 2000000; i++) puts_to(b, "{\"a\":");
    puts_to(b, "\n\n" DONE);
}

/* ---- what rows say of the result ----------------------------------------- */

static void check_sentinel(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    CHECK(r->sentinel);
}

static void check_no_sentinel(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    CHECK(!r->sentinel);
}

static void check_reason(const llmcb_result *r, const char *reason)
{
    REQUIRE(r->n_generations > 0);
    CHECK_STR(r->generations[0].finish_reason.ptr, reason);
}

static void check_stop(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    check_reason(r, "stop");
}

static void check_length(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    check_reason(r, "length");
}

static void check_filter(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    check_reason(r, "content_filter");
}

static void check_no_reason(const llmcb_result *r, const llmcb_error *e)
{
    check_sentinel(r, e);
    check_reason(r, "");
}

static void check_api(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_STR(e->type, "server_error");
    CHECK_STR(e->provider_code, "boom");
    CHECK(strstr(e->message, "it broke"));
}

static void check_api_text(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK(strstr(e->message, "it broke"));
}

static void check_401(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_INT(e->http_status, 401);
    CHECK_STR(e->provider_code, "bad_key");
    CHECK_STR(e->request_id, "req_1");
    CHECK(strstr(e->message, "no such key"));
}

static void check_403(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_INT(e->http_status, 403);
}

static void check_503(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_INT(e->http_status, 503);
    CHECK(!strstr(e->message, "<"));
}

/* The origin of the target and nothing more of it. */
static void check_redirect(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK(e->http_status == 307 || e->http_status == 302);
    CHECK(!strstr(e->message, "secret"));
}

static void check_redirect_host(const llmcb_result *r, const llmcb_error *e)
{
    check_redirect(r, e);
    CHECK(strstr(e->message, "https://evil.example:8443"));
}

static void check_three(const llmcb_result *r, const llmcb_error *e)
{
    static const char *const texts[] = { "a1a2", "b1b2", "c1c2" };
    size_t i;

    (void)e;
    REQUIRE(r->n_generations == 3);
    for (i = 0; i < 3; i++) CHECK_STR(r->generations[i].text.ptr, texts[i]);
    CHECK_STR(r->generations[1].finish_reason.ptr, "length");
}

/* Calls as "id name arguments valid; ..." */
static void check_calls(const llmcb_result *r, const char *want)
{
    bytes b = { NULL, 0, 0 };
    size_t i;

    REQUIRE(r->n_generations > 0);
    put(&b, "", 0);
    for (i = 0; i < r->generations[0].n_tool_calls; i++) {
        const llmcb_tool_call *c = &r->generations[0].tool_calls[i];
        put(&b, c->id.ptr, c->id.len);
        put(&b, " ", 1);
        put(&b, c->name.ptr, c->name.len);
        put(&b, " ", 1);
        put(&b, c->arguments.ptr, c->arguments.len);
        puts_to(&b, c->valid ? " 1;" : " 0;");
    }
    CHECK_STR(b.p, want);
    free(b.p);
}

#define CALLS_ARE(name, want)                                          \
    static void name(const llmcb_result *r, const llmcb_error *e)      \
    {                                                                  \
        (void)e;                                                       \
        check_calls(r, want);                                          \
    }
CALLS_ARE(check_one_call, "i1 f {\"a\":1} 1;")
CALLS_ARE(check_two_calls, "i1 f {\"a\":1} 1;i2 g {\"b\":2} 1;")
CALLS_ARE(check_same_name, "i1 f {\"a\":1} 1;i2 f {\"b\":2} 1;")
CALLS_ARE(check_cut_call, "i1 f {\"a\": 0;")
CALLS_ARE(check_object_call, "i1 f {\"a\": 1} 1;")

static void check_usage(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    CHECK(r->usage.known);
    CHECK_INT(r->usage.input_tokens, 3);
    CHECK_INT(r->usage.output_tokens, 4);
    CHECK_INT(r->usage.total_tokens, 7);
}

#define USAGE(in, out)                                           \
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":" #in    \
    ",\"completion_tokens\":" #out "}}\n\n"
#define TOOL(members) DELTA("\"tool_calls\":[{" members "}]")
#define FN(name, args) \
    "\"function\":{\"name\":\"" name "\",\"arguments\":\"" args "\"}"
#define ARGS(args) "\"function\":{\"arguments\":\"" args "\"}"
#define ERR_OBJECT                                                      \
    "{\"message\":\"it broke\",\"type\":\"server_error\",\"code\":\"boom\"}"
#define BOM "\xEF\xBB\xBF"
#define STREAM(events) .body = events, .frame = CHUNK
#define MORE FIN DONE

static const row rows[] = {
    /* B. The head. */
    { "fault_011_eof_before_any_byte", .end = SERVER_CLOSE, .code = LLMCB_EIO,
      .tokens = "" },
    { "fault_011_eof_at_accept", .end = SERVER_ACCEPT_CLOSE, .code = LLMCB_EIO,
      .tokens = "" },
    { "fault_012_rst_before_any_byte", .end = SERVER_RST, .code = LLMCB_EIO,
      .tokens = "" },
    { "fault_014_eof_in_status_line",
      .body = "HTTP/1.1 20", .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .curl = LLMCB_EIO, .tokens = "" },
    { "fault_015_eof_in_header", .body = SSE "Content-Le", .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_016_ssh_banner", .body = "SSH-2.0-OpenSSH_9.2\r\n",
      .end = SERVER_STALL, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_016_http_0_9", .body = "<html>hi</html>\n", .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_016_http_2_preface", .body = "HTTP/2 200\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { "fault_017_no_colon", .body = SSE "nonsense\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_017_blank_before_colon", .body = SSE "X-A : b\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_018_nul_in_header", .make = make_nul_header, .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_018_bare_cr_in_header", .body = SSE "X-A: a\rb\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_019_folded_header", .body = SSE "X-A: a\r\n b\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_020_header_90k", .make = make_header_90k, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { "fault_021_header_200k", .make = make_header_200k, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { "fault_022_headers_40000",
      .make = make_headers_40000, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { "fault_023_interims_2000",
      .make = make_interims_2000, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { "fault_023_interims_9", .make = make_interims_9, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "" },
    { "fault_023_interims_8", .make = make_interims_8, .end = SERVER_CLOSE,
      .tokens = ALL_TOKENS },
    { "fault_025_html", .head = OK "Content-Type: text/html\r\n",
      .body = "<html>log in</html>", .frame = LENGTH, .code = LLMCB_ECTYPE,
      .tokens = "" },
    { "fault_025_html_as_sse", .body = "<html>log in</html>", .frame = LENGTH,
      .code = LLMCB_ECTYPE, .tokens = "" },
    { "fault_025_html_without_tags", .head = OK "Content-Type: text/html\r\n",
      .body = "please log in", .frame = LENGTH, .code = LLMCB_ECTYPE,
      .tokens = "" },
    { "fault_025_html_with_nothing", .head = OK "Content-Type: text/html\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_ECTYPE, .tokens = "" },
    { "fault_026_json_error", .head = OK "Content-Type: application/json\r\n",
      .body = "{\"error\":" ERR_OBJECT "}", .frame = LENGTH,
      .code = LLMCB_EAPI, .tokens = "", .check = check_api },
    { "fault_026_json_error_as_sse", .body = "{\"error\":" ERR_OBJECT "}",
      .frame = LENGTH, .code = LLMCB_EAPI, .tokens = "",
      .check = check_api },
    { "fault_026_json_that_is_nothing",
      .head = OK "Content-Type: application/json\r\n",
      .body = "{\"hello\":1}", .frame = LENGTH, .code = LLMCB_EPROTO,
      .tokens = "" },
    { "fault_027_json_completion",
      .head = OK "Content-Type: application/json\r\n", .body = COMPLETION,
      .frame = LENGTH, .tokens = "Hello|", .check = check_stop },
    { "fault_027_json_completion_cut",
      .head = OK "Content-Type: application/json\r\n"
              "Content-Length: 1000\r\n\r\n" COMPLETION,
      .end = SERVER_CLOSE, .code = LLMCB_OK, .tokens = "Hello|" },
    { "fault_027_json_cut", .head = OK "Content-Type: application/json\r\n"
                              "Content-Length: 1000\r\n\r\n{\"choices\":[",
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_028_empty_body", .body = "", .frame = LENGTH,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_028_empty_chunked", .body = "", .frame = CHUNK,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_028_status_204", .body = "HTTP/1.1 204 No Content\r\n\r\n",
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_028_done_alone", STREAM(DONE), .code = LLMCB_ETRUNCATED,
      .tokens = "" },
    { "fault_029_redirect_to_host",
      .head = "HTTP/1.1 307 Temporary Redirect\r\n"
              "Location: https://evil.example:8443/v1?token=secret\r\n",
      .body = "go away", .frame = LENGTH, .code = LLMCB_EREDIRECT,
      .tokens = "", .check = check_redirect_host },
    { "fault_029_redirect_to_file",
      .head = "HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { "fault_029_redirect_to_ftp",
      .head = "HTTP/1.1 302 Found\r\nLocation: ftp://evil.example/secret\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { "fault_029_redirect_relative",
      .head = "HTTP/1.1 307 Temporary Redirect\r\n"
              "Location: /v1/chat/completions\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { "fault_029_redirect_to_unix",
      .head = "HTTP/1.1 302 Found\r\nLocation: unix:/run/secret:/v1\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { "fault_029_redirect_with_key",
      .head = "HTTP/1.1 302 Found\r\nLocation: http://" KEY ".example/\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { "fault_029_redirect_to_nowhere", .head = "HTTP/1.1 302 Found\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },

    /* C. Statuses; what is about retries is below. */
    { "fault_030_status_401",
      .head = "HTTP/1.1 401 Unauthorized\r\nX-Request-Id: req_1\r\n",
      .body = "{\"error\":{\"message\":\"no such key\",\"code\":\"bad_key\"}}",
      .frame = LENGTH, .code = LLMCB_EHTTP, .tokens = "",
      .check = check_401 },
    { "fault_030_key_echoed",
      .head = "HTTP/1.1 403 Forbidden\r\nX-Request-Id: " KEY
                                "\r\n",
      .body = "{\"error\":{\"message\":\"bad key " KEY ", really " KEY
              "\",\"type\":\"" KEY "\",\"code\":\"" KEY "\"}}",
      .frame = LENGTH, .code = LLMCB_EHTTP, .tokens = "",
      .check = check_403 },
    { "fault_030_key_echoed_escaped", .head = "HTTP/1.1 403 Forbidden\r\n",
      .body = "{\"error\":{\"message\":\"bad key \\u0073\\u006b"
              "-\\u0063anary-4f1d9b7c2e\"}}",
      .frame = LENGTH, .code = LLMCB_EHTTP, .tokens = "",
      .check = check_403 },
    { "fault_030_html_503", .head = "HTTP/1.1 503 Service Unavailable\r\n",
      .body = "<html>down</html>", .frame = LENGTH, .code = LLMCB_EHTTP,
      .tokens = "", .check = check_503 },
    { "fault_031_status_400_10mb", .make = make_400_10mb, .code = LLMCB_EHTTP,
      .tokens = "", .flags = BIG | NEW_CONN | LITTLE },

    /* D. Framing. */
    { "fault_042_eof_between_chunks", .body = TWO, .frame = CUT,
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { "fault_042_eof_between_chunks_finished", .body = TWO FIN,
      .frame = CUT, .end = SERVER_CLOSE, .tokens = ALL_TOKENS,
      .check = check_no_sentinel },
    { "fault_043_eof_after_done",
      .body = ALL, .frame = CUT, .end = SERVER_CLOSE,
      .tokens = ALL_TOKENS, .flags = NEW_CONN, .check = check_sentinel },
    { "fault_043_rst_after_done", .body = ALL, .frame = CUT, .end = SERVER_RST,
      .tokens = ALL_TOKENS, .flags = NEW_CONN, .check = check_sentinel },
    { "fault_044_eof_in_chunk",
      .body = CHUNKED "ff\r\n" TWO "data: {\"choices\":[{\"index\"",
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { "fault_044_eof_in_chunk_size", .body = CHUNKED "f", .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_044_eof_in_last_chunk",
      .body = CHUNKED "0\r\n", .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_045_rst_in_chunk",
      .body = CHUNKED "ff\r\n" TWO "data: {\"choices\":[{\"index\"",
      .end = SERVER_RST, .code = LLMCB_EIO, .tokens = TWO_TOKENS },
    { "fault_045_rst_finished", .body = TWO FIN, .frame = CUT,
      .end = SERVER_RST, .code = LLMCB_EIO, .tokens = ALL_TOKENS },
    { "fault_046_eof_closes_body", .body = TWO, .frame = TO_CLOSE,
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { "fault_047_rst_closes_body", .body = TWO, .frame = TO_CLOSE,
      .end = SERVER_RST, .code = LLMCB_EIO, .tokens = TWO_TOKENS },
    { "fault_048_length_too_large",
      .body = SSE "Content-Length: 1000\r\n\r\n" TWO, .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { "fault_049_length_too_small",
      .body = SSE "Content-Length: 100\r\n\r\n" ALL, .end = SERVER_KEEP,
      .code = LLMCB_ETRUNCATED, .tokens = "Hel|",
      .flags = SOCK_CONN | AT_ONCE },
    { "fault_050_length_negative",
      .body = SSE "Content-Length: -5\r\n\r\n" ALL, .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_050_length_plus", .body = SSE "Content-Length: +5\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { "fault_050_length_empty", .body = SSE "Content-Length:\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { "fault_051_length_overflows",
      .body = SSE "Content-Length: 99999999999999999999\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_051_length_over_limit",
      .body = SSE "Content-Length: 9999999999\r\n\r\n" TWO,
      .end = SERVER_CLOSE, .code = LLMCB_ELIMIT, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .curl_tokens = TWO_TOKENS },
    { "fault_052_length_junk", .body = SSE "Content-Length: 12abc\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .flags = AT_ONCE },
    { "fault_053_length_twice",
      .body = SSE "Content-Length: 5\r\nContent-Length: 6\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .flags = AT_ONCE },
    { "fault_053_length_twice_equal",
      .body = SSE "Content-Length: 5\r\nContent-Length: 5\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = "",
      .flags = AT_ONCE },
    { "fault_054_length_and_chunked",
      .head = SSE "Content-Length: 5\r\n", STREAM(ALL),
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_055_unknown_coding",
      .body = SSE "Transfer-Encoding: rot13\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_055_chunked_twice",
      .head = SSE "Transfer-Encoding: chunked\r\n", STREAM(ALL),
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { "fault_056_chunk_size_zz", .body = CHUNKED "zz\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_056_chunk_size_negative", .body = CHUNKED "-5\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_056_chunk_size_16f", .body = CHUNKED "ffffffffffffffff\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_056_chunk_size_17f", .body = CHUNKED "fffffffffffffffff\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_056_chunk_size_wraps", /* 2^64 + 5 */
      .body = CHUNKED "10000000000000005\r\n: a\n\n\r\n0\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_056_chunk_size_0x", .body = CHUNKED "0x5\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { "fault_056_chunk_size_blank", .body = CHUNKED " 5\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_056_chunk_size_none", .body = CHUNKED "\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_057_chunk_size_7f", .body = CHUNKED "7fffffffffffffff\r\n" TWO,
      .end = SERVER_CLOSE, .code = LLMCB_ELIMIT, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .curl_tokens = TWO_TOKENS },
    { "fault_058_bare_lf_chunks",
      .body = CHUNKED "5\n: a\n\n\n0\n\n", .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .curl = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_058_bare_lf_head",
      .body = "HTTP/1.1 200 OK\nContent-Type: text/event-stream\n\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_059_extension_1mb", .make = make_ext_1mb, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .curl = CURL_OK, .tokens = "",
      .curl_tokens = ALL_TOKENS, .flags = BIG },
    { "fault_059_extension_256", .make = make_ext_256, .tokens = ALL_TOKENS },
    { "fault_059_extension_257", .make = make_ext_257, .code = LLMCB_ELIMIT,
      .curl = CURL_OK, .tokens = "", .curl_tokens = ALL_TOKENS },
    { "fault_060_tiny_chunks", .make = make_tiny_chunks, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .curl = CURL_OK, .tokens = "",
      .curl_tokens = ALL_TOKENS, .flags = BIG },
    { "fault_061_junk_behind_chunk",
      .body = CHUNKED "5\r\n: a\n\nxx5\r\n: b\n\n\r\n0\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { "fault_062_trailers",
      .body = CHUNKED "5\r\n: a\n\n\r\n0\r\nContent-Length: 7\r\n"
                      "X-T: t\r\n\r\n",
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { "fault_062_trailer_too_long", .make = make_long_trailer,
      .end = SERVER_CLOSE, .code = LLMCB_ELIMIT, .curl = CURL_NO,
      .tokens = ALL_TOKENS, .flags = BIG },
    { "fault_063_gzip",
      .make = make_gzip, .code = LLMCB_ECTYPE, .tokens = "" },
    { "fault_064_gzip_bomb", .make = make_gzip_350k, .code = LLMCB_ECTYPE,
      .tokens = "", .flags = BIG },
    { "fault_065_gzip_cut",
      .head = SSE "Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_ECTYPE, .tokens = "" },
    { "fault_065_brotli",
      .head = SSE "Content-Encoding: br\r\n", .body = "xxxx",
      .frame = LENGTH, .code = LLMCB_ECTYPE, .tokens = "" },
    { "fault_066_response_splitting", .make = make_split_response,
      .tokens = ALL_TOKENS, .flags = SOCK_CONN | AT_ONCE },

    /* E. Event streams. */
    { "fault_068_plain", STREAM(ALL), .tokens = ALL_TOKENS,
      .check = check_sentinel },
    { "fault_069_cr",
      .head = SSE, .frame = LENGTH,
      .body = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\r"
              "data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\r\r"
              "data: [DONE]\r\r",
      .tokens = "a|b|" },
    { "fault_069_crlf",
      .head = SSE, .frame = LENGTH,
      .body = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n"
              "data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\r\n\r\n"
              "data: [DONE]\r\n\r\n",
      .tokens = "a|b|" },
    { "fault_069_mixed",
      .head = SSE, .frame = LENGTH,
      .body = ": c\r:d\n:e\r\n"
              "data: {\"choices\":[\rdata: {\"delta\":{\"content\":\"a\"}}]}"
              "\r\n\n"
              "data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\n\r"
              "data: [DONE]\r\r\n",
      .tokens = "a|b|" },
    { "fault_070_bom", STREAM(BOM ALL), .tokens = ALL_TOKENS },
    { "fault_070_bom_twice", STREAM(BOM BOM ALL), .tokens = "lo||" },
    { "fault_070_bom_later", STREAM(EV("Hel") BOM EV("lo") MORE),
      .tokens = "Hel||" },
    { "fault_070_bom_begun", STREAM("\xEF\xBB" EV("Hel") EV("lo") MORE),
      .tokens = "lo||" },
    { "fault_070_bom_in_text", STREAM(EV(BOM) MORE), .tokens = BOM "||" },
    { "fault_071_ping",
      STREAM(": ping\n\n" EV("Hel") ": ping\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_071_ping_with_id",
      STREAM("id: 1\n\n" EV("Hel") "id: 2\n: ping\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_072_no_blank",
      STREAM("data:{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n"
             "data:[DONE]\n\n"),
      .tokens = "a|" },
    { "fault_072_two_blanks",
      STREAM("data:  {\"choices\":[{\"delta\":{\"content\":\" a\"}}]}\n\n"
             MORE),
      .tokens = " a||" },
    { "fault_072_data_alone", STREAM("data\n\ndata:\n\ndata: \n\n" ALL),
      .tokens = ALL_TOKENS },
    { "fault_073_many_data_lines",
      STREAM("data: {\"choices\":\ndata: [{\"delta\":\ndata\ndata:"
             "{\"content\":\"a\"}}]}\n\n" MORE),
      .tokens = "a||" },
    { "fault_073_newline_in_string", /* joined by LF: not valid in a string */
      STREAM(EV("Hel")
             "data: {\"choices\":[{\"delta\":{\"content\":\"a\ndata: b\"}}]}"
             "\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = "Hel|" },
    { "fault_074_event_error_flat",
      STREAM(TWO "event: error\ndata: " ERR_OBJECT "\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { "fault_074_event_error_nested",
      STREAM(TWO "event: error\ndata: {\"error\":" ERR_OBJECT "}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { "fault_074_event_error_no_json",
      STREAM(TWO "event: error\ndata: it broke\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS },
    { "fault_075_unknown_fields",
      STREAM("foo: bar\nretry: 1e9\nid: 5\nevent: x\n" ALL),
      .tokens = ALL_TOKENS },
    { "fault_075_field_without_colon", STREAM("nonsense\n" ALL),
      .tokens = ALL_TOKENS },
    { "fault_076_behind_done",
      STREAM(ALL "data: {\"broken\n\n" EV("AFTER")
             "event: error\ndata: {}\n\n"),
      .tokens = ALL_TOKENS, .check = check_sentinel },
    { "fault_077_done_x", STREAM(TWO "data: [DONE]x\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_077_blank_done", STREAM(TWO "data:  [DONE]\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_077_done_line", STREAM(TWO "data: [DONE]\ndata: x\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_077_done_small", STREAM(TWO "data: [done]\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_078_undispatched",
      .body = TWO "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n",
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { "fault_078_undispatched_finish",
      .body = TWO "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n",
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { "fault_078_undispatched_done", .body = TWO "data: [DONE]\n",
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { "fault_078_undispatched_behind_finish",
      .body = TWO FIN "data: {\"choi", .frame = TO_CLOSE,
      .end = SERVER_CLOSE, .tokens = ALL_TOKENS,
      .check = check_no_sentinel },
    { "fault_079_line_64m", .make = make_line_64m, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "Hel|", .flags = BIG | NEW_CONN },
    { "fault_082_nul", .make = make_nul_data, .end = SERVER_CLOSE,
      .code = LLMCB_EJSON, .tokens = "Hel|" },
    { "fault_082_ff", STREAM(EV("Hel") EV("a\xFF""b") MORE),
      .tokens = "Hel|a\xEF\xBF\xBD""b||" },
    { "fault_082_overlong", STREAM(EV("\xC0\xAF") EV("x") MORE),
      .tokens = "\xEF\xBF\xBD\xEF\xBF\xBD|x||" },
    { "fault_082_surrogate_in_utf8", STREAM(EV("\xED\xA0\x80") EV("x") MORE),
      .tokens = "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD|x||" },
    { "fault_082_half_characters", /* cut by the server between two tokens */
      STREAM(EV("\xE2\x82") EV("\xAC") EV("\xF0\x9F") EV("\x98\x80") MORE),
      .tokens = "|\xE2\x82\xAC||\xF0\x9F\x98\x80||" },
    { "fault_082_half_character_lost", STREAM(EV("a\xE2\x82") DONE),
      .tokens = "a|\xEF\xBF\xBD|" },

    /* F. JSON and what it means. */
    { "fault_083_malformed",
      STREAM(TWO "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}]}\n\n"
             MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_083_truncated", STREAM(TWO "data: {\"choices\":[{\n\n"),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_083_trailing_comma",
      STREAM(TWO "data: {\"choices\":[],}\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_083_two_values", STREAM(TWO "data: {} {}\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_083_no_object", STREAM(TWO "data: 5\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { "fault_084_brackets_10mb", .make = make_brackets, .end = SERVER_CLOSE,
      .code = LLMCB_EJSON, .tokens = "Hel|", .flags = BIG },
    { "fault_084_objects_10mb", .make = make_objects, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "Hel|", .flags = BIG },
    { "fault_085_numbers",
      STREAM("data: {\"created\":1e999,\"x\":-0,\"y\":12345678901234567890,"
             "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n"
             MORE),
      .tokens = "a||" },
    { "fault_085_index_huge", STREAM(TWO CHOICE(4294967295, "x") MORE),
      .code = LLMCB_ELIMIT, .tokens = TWO_TOKENS },
    { "fault_085_index_2_63",
      STREAM(TWO CHOICE(9223372036854775807, "x") MORE),
      .code = LLMCB_ELIMIT, .tokens = TWO_TOKENS },
    { "fault_085_index_20_digits",
      STREAM(CHOICE(99999999999999999999, "x") MORE),
      .tokens = "x||" },
    { "fault_085_index_negative",
      STREAM(CHOICE(-1, "x") MORE), .tokens = "x||" },
    { "fault_085_index_fraction",
      STREAM(CHOICE(1.5, "x") MORE), .tokens = "x||" },
    { "fault_085_index_string",
      STREAM(CHOICE("0", "x") MORE), .tokens = "x||" },
    { "fault_085_tool_index_huge",
      STREAM(TOOL("\"index\":4294967295,\"id\":\"i1\"," FN("f", "{\\\"a\\\""))
             TOOL("\"index\":4294967295," ARGS(":1}"))
             MORE),
      .tokens = "|||", .check = check_one_call },
    { "fault_085_usage_odd",
      STREAM(TWO "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,"
             "\"completion_tokens\":4,\"total_tokens\":1e999}}\n\n" MORE),
      .tokens = "Hel|lo|||", .check = check_usage },
    { "fault_086_escapes",
      STREAM(EV("\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC")
                            MORE),
      .tokens = "\"\\/\\x08\\x0c\\x0a\\x0d\\x09\xC3\xA9\xE2\x82\xAC||" },
    { "fault_086_surrogates", STREAM(EV("\\ud83d\\ude00") MORE),
      .tokens = "\xF0\x9F\x98\x80||" },
    { "fault_086_surrogates_in_two_tokens", STREAM(EV("\\ud83d") EV("\\ude00")
                                             MORE),
      .tokens = "|\xF0\x9F\x98\x80||" },
    { "fault_086_lone_high", STREAM(EV("\\ud83dx") MORE),
      .tokens = "\xEF\xBF\xBDx||" },
    { "fault_086_lone_low", STREAM(EV("\\ude00x") MORE),
      .tokens = "\xEF\xBF\xBDx||" },
    { "fault_086_nul", STREAM(EV("a\\u0000b") MORE), .tokens = "a\\x00b||" },
    { "fault_086_bad_escape", STREAM(EV("Hel") EV("\\x") MORE),
      .code = LLMCB_EJSON, .tokens = "Hel|" },
    { "fault_087_choices_empty", STREAM(EV("Hel") "data: {\"choices\":[]}\n\n"
                                  EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_choices_missing",
      STREAM(EV("Hel") "data: {}\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_choices_null", STREAM(EV("Hel") "data: {\"choices\":null}\n\n"
                                 EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_choices_object", STREAM(EV("Hel") "data: {\"choices\":{}}\n\n"
                                   EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_choices_of_numbers",
      STREAM(EV("Hel") "data: {\"choices\":[1,null,[]]}\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_delta_null",
      STREAM(EV("Hel") "data: {\"choices\":[{\"index\":0,\"delta\":null}]}"
             "\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_delta_missing",
      STREAM(EV("Hel") "data: {\"choices\":[{\"index\":0}]}\n\n" EV("lo")
             MORE),
      .tokens = ALL_TOKENS },
    { "fault_087_content_null", STREAM(DELTA("\"content\":null") ALL),
      .tokens = "|" ALL_TOKENS },
    { "fault_087_content_number", STREAM(DELTA("\"content\":5") ALL),
      .tokens = "|" ALL_TOKENS },
    { "fault_087_content_array", STREAM(DELTA("\"content\":[\"x\"]") ALL),
      .tokens = "|" ALL_TOKENS },
    { "fault_087_tool_calls_null", STREAM(DELTA("\"tool_calls\":null") ALL),
      .tokens = "|" ALL_TOKENS },
    { "fault_087_nothing_but_empty_choices",
      STREAM("data: {\"choices\":[]}\n\n" DONE), .code = LLMCB_ETRUNCATED,
      .tokens = "" },
    { "fault_088_role_first",
      STREAM(DELTA("\"role\":\"assistant\",\"content\":\"\"") EV("") ALL),
      .tokens = "||" ALL_TOKENS },
    { "fault_089_error_object",
      STREAM(TWO "data: {\"error\":" ERR_OBJECT "}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { "fault_089_error_text",
      STREAM(TWO "data: {\"error\":\"it broke\"}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api_text },
    { "fault_089_error_null",
      STREAM(EV("Hel") "data: {\"error\":null,\"choices\":[{\"index\":0,"
             "\"delta\":{\"content\":\"lo\"}}]}\n\n" MORE),
      .tokens = ALL_TOKENS },
    { "fault_089_error_beside_choices",
      STREAM(TWO "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],"
             "\"error\":" ERR_OBJECT "}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { "fault_089_error_before_eof", .body = TWO "data: {\"error\":" ERR_OBJECT
                                      "}\n\n",
      .frame = CUT, .end = SERVER_RST, .code = LLMCB_EAPI,
      .tokens = TWO_TOKENS, .check = check_api },
    { "fault_090_finish_twice",
      STREAM(TWO FIN FIN_OF(0, "length") DONE), .tokens = "Hel|lo|||",
      .check = check_stop },
    { "fault_090_text_behind_finish", STREAM(EV("Hel") FIN EV("lo") DONE),
      .tokens = "Hel||lo|", .check = check_stop },
    { "fault_090_text_with_finish",
      STREAM(EV("Hel") "data: {\"choices\":[{\"index\":0,\"delta\":"
             "{\"content\":\"lo\"},\"finish_reason\":\"stop\"}]}\n\n" DONE),
      .tokens = TWO_TOKENS, .check = check_stop },
    { "fault_091_done_without_reason", STREAM(TWO DONE), .tokens = TWO_TOKENS,
      .check = check_no_reason },
    { "fault_091_reason_without_done", STREAM(TWO FIN),
      .tokens = ALL_TOKENS, .check = check_no_sentinel },
    { "fault_091_reason_without_done_eof", .body = TWO FIN,
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .tokens = ALL_TOKENS,
      .check = check_no_sentinel },
    { "fault_091_no_evidence", STREAM(TWO), .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { "fault_091_one_of_two_finished",
      STREAM(CHOICE(0, "a") CHOICE(1, "b") FIN),
      .code = LLMCB_ETRUNCATED, .tokens = "a|b||", .n = 2 },
    { "fault_091_second_never_came", STREAM(CHOICE(0, "a") FIN),
      .code = LLMCB_ETRUNCATED, .tokens = "a||", .n = 2 },
    { "fault_092_length",
      STREAM(TWO FIN_OF(0, "length") DONE), .tokens = ALL_TOKENS,
      .check = check_length },
    { "fault_092_content_filter", STREAM(TWO FIN_OF(0, "content_filter") DONE),
      .tokens = ALL_TOKENS, .check = check_filter },
    { "fault_093_three_choices",
      STREAM(CHOICE(2, "c1") CHOICE(0, "a1") CHOICE(1, "b1") CHOICE(0, "a2")
             FIN_OF(0, "stop") CHOICE(2, "c2") CHOICE(1, "b2")
             FIN_OF(1, "length") FIN_OF(2, "stop") DONE),
      .tokens = "c1|a1|b1|a2||c2|b2|||", .n = 3, .check = check_three },
    { "fault_093_three_choices_in_one_event",
      STREAM("data: {\"choices\":["
             "{\"index\":2,\"delta\":{\"content\":\"c1c2\"}},"
             "{\"index\":0,\"delta\":{\"content\":\"a1a2\"}},"
             "{\"index\":1,\"delta\":{\"content\":\"b1b2\"},"
             "\"finish_reason\":\"length\"}]}\n\n" DONE),
      .tokens = "c1c2|a1a2|b1b2|", .n = 3, .check = check_three },
    { "fault_094_tool_no_index",
      STREAM(TOOL("\"id\":\"i1\"," FN("f", "{\\\"a\\\"")) TOOL(ARGS(":1}"))
             TOOL("\"id\":\"i2\"," FN("g", "{\\\"b\\\":")) TOOL(ARGS("2}"))
             MORE),
      .tokens = "|||||", .check = check_two_calls },
    { "fault_094_tool_whole_no_index",
      STREAM(DELTA("\"tool_calls\":[{\"id\":\"i1\","
                   FN("f", "{\\\"a\\\":1}") "},{\"id\":\"i2\","
                   FN("g", "{\\\"b\\\":2}") "}]")
             MORE),
      .tokens = "||", .check = check_two_calls },
    { "fault_094_tool_index_repeated",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":1}"))
             TOOL("\"index\":0,\"id\":\"i2\"," FN("f", "{\\\"b\\\":2}"))
             MORE),
      .tokens = "|||", .check = check_same_name },
    { "fault_094_tool_index_null",
      STREAM(TOOL("\"index\":null,\"id\":\"i1\"," FN("f", "{\\\"a\\\":"))
             TOOL("\"index\":null," ARGS("1}"))
             MORE),
      .tokens = "|||", .check = check_one_call },
    { "fault_094_tool_id_later",
      STREAM(TOOL("\"index\":0," FN("f", "{"))
             TOOL("\"index\":0,\"id\":\"i1\"," ARGS("\\\"a\\\":1}"))
             MORE),
      .tokens = "|||", .check = check_one_call },
    { "fault_094_tool_id_and_name_null_later",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{"))
             TOOL("\"index\":0,\"id\":null,\"function\":{\"name\":null,"
                  "\"arguments\":\"\\\"a\\\":1}\"}")
             TOOL("\"index\":0,\"id\":\"\"," FN("", ""))
             MORE),
      .tokens = "||||", .check = check_one_call },
    { "fault_094_tool_interleaved",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":"))
             TOOL("\"index\":1,\"id\":\"i2\"," FN("g", "{\\\"b\\\":"))
             TOOL("\"index\":0," ARGS("1}")) TOOL("\"index\":1," ARGS("2}"))
             MORE),
      .tokens = "|||||", .check = check_two_calls },
    { "fault_094_tool_arguments_object",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\",\"function\":{\"name\":\"f\","
                  "\"arguments\":{\"a\": 1}}")
             MORE),
      .tokens = "||", .check = check_object_call },
    { "fault_094_tool_arguments_cut", /* never repaired */
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":")) MORE),
      .tokens = "||", .check = check_cut_call },
    { "fault_094_tool_reason_stop",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":1}"))
             FIN DONE),
      .tokens = "||", .check = check_one_call },
    { "fault_095_usage_before", STREAM(USAGE(3, 4) ALL),
      .tokens = "|" ALL_TOKENS, .check = check_usage },
    { "fault_095_usage_behind", STREAM(TWO FIN USAGE(3, 4) DONE),
      .tokens = ALL_TOKENS "|", .check = check_usage },
    { "fault_095_usage_twice", STREAM(TWO FIN USAGE(1, 2) USAGE(3, 4) DONE),
      .tokens = ALL_TOKENS "||", .check = check_usage },
    { "fault_095_usage_null_later",
      STREAM(USAGE(3, 4) TWO
             "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],"
             "\"usage\":null}\n\n" DONE),
      .tokens = "|" ALL_TOKENS, .check = check_usage },
};

#define N_ROWS (sizeof rows / sizeof *rows)

/* ---- running a row ------------------------------------------------------- */

static llmcb_code row_code(const row *r, int transport)
{
    if (transport != CURL_T || !r->curl) return r->code;
    return r->curl == CURL_OK ? LLMCB_OK : (llmcb_code)r->curl;
}

/* What each handler is told. */
static void row_log(char *out, size_t cap, const row *r, int transport)
{
    llmcb_code code = row_code(r, transport);

    snprintf(out, cap, "start|%s%s%s",
             transport == CURL_T && r->curl_tokens ? r->curl_tokens : r->tokens,
             code ? "error:" : "end", code ? llmcb_code_name(code) + 6 : "");
}

static void run_row(const row *f, int transport, const bytes *b, bool trickle)
{
    const server_segment at_end = hold(b->len);
    server_script bad = script(b->p, f->end);
    llmcb_code want = row_code(f, transport);
    server_script s[2];
    char log[512];
    trial t;

    row_log(log, sizeof log, f, transport);
    bad.len = b->len;
    bad.trickle = trickle;
    if (f->end == SERVER_RST && transport != REPLAY) {
        /* the reset must not overtake what the client has not read */
        bad.segments = &at_end;
        bad.n_segments = 1;
    }
    s[0] = bad;
    s[1] = script(CLEAN, SERVER_CLOSE);
    fault_begin(&t, transport, s, 2);
    t.cd.n = f->n;
    t.turns = 2000 + 8 * b->len;
    trial_open(&t);
    trial_ask(&t);
    if (bad.n_segments) {
        unsigned events = (unsigned)count_of(log, "|");
        /* what is known before the reset must be known without it */
        if (want == LLMCB_EIO) trial_until(&t, events);
        else trial_wait(&t);
        server_go(t.server);
    }
    fault_finish(&t, log, want);
    if (f->check && want == f->code)
        f->check(llmcb_op_result(t.op), llmcb_op_error(t.op));
    if (f->flags & LITTLE && transport != REPLAY)
        CHECK(t.heap.peak < 256 * 1024);
    trial_clean(&t);
    if (t.server && (f->flags & NEW_CONN ||
                     (f->flags & SOCK_CONN && transport == SOCK))) {
        CHECK_INT(server_connections(t.server), 2);
        CHECK_INT(server_requests(t.server), 2);
        CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
    }
    trial_close(&t);
}

#if defined(__SANITIZE_THREAD__)
#define STRIDE 13 /* one thread only: there is little to find */
#else
#define STRIDE 1
#endif

/* A loop on which the same bytes are played again and again, to one handler,
 * cut in another way each time. */
static void cuts_begin(trial *t, int n)
{
    server_script clean = script(CLEAN, SERVER_CLOSE);

    fault_begin(t, REPLAY, &clean, 1);
    t->cd.n = n;
    t->cd.n_callbacks = 1;
    trial_open(t);
}

static void cuts_play(trial *t, const llmcb_recording *tape, const char *log,
                      llmcb_code code)
{
    llmcb_replay_desc d;

    memset(&d, 0, sizeof d);
    d.recordings = tape;
    d.n_recordings = 1;
    t->turns = 2000 + 8 * tape->len;
    llmcb_op_free(t->op);
    llmcb_chat_free(t->chat);
    t->cd.transport = llmcb_replay_new(t->loop, &d);
    t->chat = llmcb_chat_new(t->loop, &t->cd);
    trial_forget(t);
    trial_ask(t);
    trial_wait(t);
    CHECK_REC(t->r[0]);
    CHECK_STR(t->r[0]->log, log);
    CHECK_STR(llmcb_code_name(llmcb_op_code(t->op)), llmcb_code_name(code));
    CHECK(!saw[0].differs);
}

static void cuts_end(trial *t)
{
    llmcb_chat_free(t->chat);
    t->cd.n_callbacks = 3;
    t->cd.transport = t->tr;
    t->chat = llmcb_chat_new(t->loop, &t->cd);
    trial_end(t);
}

/* All single splits, and byte by byte: the same tokens and the same end. */
static void run_splits(const row *f, const bytes *b)
{
    llmcb_segment *one =
        (llmcb_segment *)calloc(b->len + 1, sizeof *one), two[2];
    llmcb_recording tape;
    char log[512];
    trial t;
    size_t k;

    if (!one) abort();
    row_log(log, sizeof log, f, REPLAY);
    memset(two, 0, sizeof two);
    memset(&tape, 0, sizeof tape);
    tape.bytes = b->p;
    tape.len = b->len;
    tape.end = tape_end(f->end);
    for (k = 0; k < b->len; k++) one[k].offset = k;
    cuts_begin(&t, f->n);
    for (k = 0; k < b->len && !test_failures_here; k += STRIDE) {
        tape.segments = k ? two : one;
        tape.n_segments = k ? 2 : b->len;
        two[1].offset = k;
        cuts_play(&t, &tape, log, f->code);
        if (f->check) f->check(llmcb_op_result(t.op), llmcb_op_error(t.op));
        if (test_failures_here)
            TEST_FAIL("that was with a split at %lu (0: every byte)",
                      (unsigned long)k);
    }
    cuts_end(&t);
    free(one);
}

static void run_all(const row *f, int transport)
{
    bytes b = make_row(f);

    run_row(f, transport, &b, false);
    if (!(f->flags & BIG)) {
        if (transport == REPLAY) run_splits(f, &b);
        else if (!(f->flags & AT_ONCE) && !test_failures_here)
            run_row(f, transport, &b, true);
    }
    free(b.p);
}

/* -- C: a try that fails */

typedef struct retry_row {
    const char *name;
    const char *first;  /* the answer that fails */
    int64_t low, high;  /* the delay; high < 0: there is no retry */
    llmcb_code code;    /* then */
    server_end end;     /* of the first answer */
    bool not_curl;      /* which takes it for another fault */
} retry_row;

#define FAIL(status, fields) \
    "HTTP/1.1 " status " X\r\n" fields "Content-Length: 0\r\n\r\n"
#define DIGITS "99999999999999999999999999999999999999999999999999999999999999"
#define DIGITS_4 DIGITS DIGITS DIGITS DIGITS
#define DIGITS_16 DIGITS_4 DIGITS_4 DIGITS_4 DIGITS_4
#define AFTER(value) FAIL("429", "Retry-After: " value "\r\n")
#define AFTER_MS(value) FAIL("429", "retry-after-ms: " value "\r\n")
/* It is 22:13:20.3 on that day. */
#define AT(time) AFTER("Tue, 14 Nov 2023 " time " GMT")
#define NO_RETRY 0, -1, LLMCB_EHTTP, SERVER_KEEP, false
#define IN(ms) ms, ms, LLMCB_OK, SERVER_KEEP, false
#define BACK_OFF 376, 500, LLMCB_OK, SERVER_KEEP, false
#define FINAL(code) 0, -1, code, SERVER_CLOSE, false

static const retry_row retry_rows[] = {
    { "fault_011_retried", "", 376, 500, LLMCB_OK, SERVER_CLOSE, false },
    { "fault_012_retried", "", 376, 500, LLMCB_OK, SERVER_RST, false },
    { "fault_014_not_retried", "HTTP/1.1 20", 0, -1, LLMCB_EPROTO,
      SERVER_CLOSE, true },
    { "fault_015_not_retried", OK "A", FINAL(LLMCB_ETRUNCATED) },
    { "fault_025_not_retried", OK "Content-Type: text/html\r\n\r\n<",
      FINAL(LLMCB_ECTYPE) },
    { "fault_026_not_retried", OK "\r\n{\"error\":\"x\"}", FINAL(LLMCB_EAPI) },
    { "fault_028_not_retried", OK "\r\n", FINAL(LLMCB_ETRUNCATED) },
    { "fault_030_401_not_retried", FAIL("401", ""), NO_RETRY },
    { "fault_030_403_not_retried", FAIL("403", ""), NO_RETRY },
    { "fault_032_retry_after_seconds", AFTER("1"), IN(1000) },
    { "fault_033_date_ahead", AT("22:13:22"), IN(2000) },
    { "fault_033_date_ahead_by_little", AT("22:13:21"), IN(1000) },
    { "fault_033_date_now", AT("22:13:20"), IN(0) },
    { "fault_033_date_past", AT("21:00:00"), IN(0) },
    { "fault_033_date_at_cap", AT("22:15:20"), IN(120000) },
    { "fault_033_date_above_cap", AT("22:15:21"), NO_RETRY },
    { "fault_033_date_far", AFTER("Sat, 14 Nov 2093 22:13:20 GMT"), NO_RETRY },
    { "fault_034_ms", FAIL("429", "retry-after-ms: 250\r\nRetry-After: 9\r\n"),
      IN(250) },
    { "fault_034_ms_wins_behind",
      FAIL("429", "Retry-After: 9\r\nretry-after-ms: 250\r\n"), IN(250) },
    { "fault_034_ms_fraction", AFTER_MS("250.7"), 250, 251, LLMCB_OK,
      SERVER_KEEP, false },
    { "fault_034_ms_zero", AFTER_MS("0"), IN(0) },
    { "fault_034_zero", AFTER("0"), IN(0) },
    { "fault_034_half", AFTER("0.5"), IN(500) },
    { "fault_035_at_cap", AFTER("120"), IN(120000) },
    { "fault_035_above_cap", AFTER("121"), NO_RETRY },
    { "fault_035_ms_above_cap", AFTER_MS("120001"), NO_RETRY },
    { "fault_035_epoch", AFTER("1771404540"), NO_RETRY },
    { "fault_035_digits_4k", AFTER(DIGITS_16 DIGITS_16 DIGITS_16 DIGITS_16),
      NO_RETRY },
    { "fault_035_negative", AFTER("-5"), BACK_OFF },
    { "fault_035_nan", AFTER("NaN"), BACK_OFF },
    { "fault_035_exponent", AFTER("1e400"), BACK_OFF },
    { "fault_035_empty", FAIL("429", "Retry-After:\r\n"), BACK_OFF },
    { "fault_035_junk_date", AFTER("Foo, 99 Bar 2099 99:99:99 GMT"),
      BACK_OFF },
    { "fault_036_500", FAIL("500", ""), BACK_OFF },
    { "fault_036_502_html",
      "HTTP/1.1 502 X\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n"
      "<html>",
      BACK_OFF },
    { "fault_036_503", FAIL("503", ""), BACK_OFF },
    { "fault_036_504", FAIL("504", ""), BACK_OFF },
    { "fault_040_408", FAIL("408", ""), BACK_OFF },
    { "fault_040_409", FAIL("409", ""), BACK_OFF },
    { "fault_040_400", FAIL("400", ""), NO_RETRY },
    { "fault_040_404", FAIL("404", ""), NO_RETRY },
    { "fault_040_422", FAIL("422", ""), NO_RETRY },
    { "fault_040_should_retry_400", FAIL("400", "x-should-retry: true\r\n"),
      BACK_OFF },
    { "fault_040_should_not_retry_500",
      FAIL("500", "x-should-retry: false\r\n"), NO_RETRY },
    { "fault_040_should_retry_maybe", FAIL("500", "x-should-retry: maybe\r\n"),
      BACK_OFF },
};

#define N_RETRY_ROWS (sizeof retry_rows / sizeof *retry_rows)

/* The clock moves over the end of the k-th delay: no try before it. Where
 * clocks are real, timers add a millisecond to be never early. */
static void pass_delay(trial *t, unsigned k)
{
    if (t->transport == REPLAY) return; /* it moves by itself */
    trial_until(t, k + 1);
    if (saw[0].delay[k - 1] > 0) {
        pass_ms(t, saw[0].delay[k - 1]);
        CHECK_INT(server_requests(t->server), k);
        pass_ms(t, 1);
    }
}

static void run_retry(const retry_row *f, int transport)
{
    server_script s[2] = { script(f->first, f->end),
                           script(CLEAN, SERVER_CLOSE) };
    char log[64];
    trial t;

    fault_begin(&t, transport, s, 2);
    sys.still = true;
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    if (f->high >= 0) {
        int64_t delay;

        pass_delay(&t, 1);
        fault_finish(&t, "start|retry:1|clean|end", f->code);
        delay = saw[0].delay[0];
        CHECK(delay >= f->low && delay <= f->high);
        CHECK_INT(saw[0].attempt[0], 1);
        CHECK_INT(saw[0].n_retries, 1);
        if (transport == REPLAY) /* its 0 is no time that can be due */
            CHECK_INT(llmcb_loop_now(t.loop), delay ? delay : 1);
    } else {
        snprintf(log, sizeof log, "start|error:%s",
                 llmcb_code_name(f->code) + 6);
        fault_finish(&t, log, f->code);
        CHECK_INT(llmcb_op_error(t.op)->attempt, 1);
        if (transport == REPLAY) CHECK_INT(llmcb_loop_now(t.loop), 0);
    }
    if (t.server) CHECK_INT(server_requests(t.server), f->high >= 0 ? 2 : 1);
    trial_end(&t);
}

/* -- one test a row and transport */

static const char *const transport_names[] = { "replay", "sock", "curl" };
#define N_CASES ((N_ROWS + N_RETRY_ROWS) * N_TRANSPORTS)

static struct row_case {
    test_case test; /* first */
    char name[96];
    const row *row;
    const retry_row *retry;
    int transport;
} row_cases[N_CASES];
static size_t n_row_cases;

static void run_current(void)
{
    size_t i;

    for (i = 0; i < n_row_cases; i++) {
        const struct row_case *c = &row_cases[i];
        if (test_current != c->name) continue;
        if (c->row) run_all(c->row, c->transport);
        else run_retry(c->retry, c->transport);
    }
}

static void register_row(const row *f, const retry_row *r, int transport)
{
    struct row_case *c = &row_cases[n_row_cases];

#ifdef LLMCB_NO_CURL
    if (transport == CURL_T) return;
#endif
    if (transport == CURL_T && (f ? f->curl == CURL_NO : r->not_curl)) return;
    n_row_cases++;
    snprintf(c->name, sizeof c->name, "%s_%s", f ? f->name : r->name,
             transport_names[transport]);
    c->row = f;
    c->retry = r;
    c->transport = transport;
    c->test.name = c->name;
    c->test.run = run_current;
    test_add(&c->test);
}

__attribute__((constructor)) static void register_rows(void)
{
    size_t i;
    int t;

    for (t = 0; t < N_TRANSPORTS; t++) {
        for (i = 0; i < N_ROWS; i++) register_row(&rows[i], NULL, t);
        for (i = 0; i < N_RETRY_ROWS; i++)
            register_row(NULL, &retry_rows[i], t);
    }
}

/* ---- what needs more than a row ------------------------------------------ */

#define KEPT SSE "Content-Length: 74\r\n\r\n" EV("kept") DONE

static void turn_until_asked(trial *t)
{
    while (!server_requests(t->server) && !llmcb_op_done(t->op))
        llmcb_loop_run_once(t->loop, 1);
}

/* The server goes on to its next border, and what it sent is read. */
static void let_server(trial *t, size_t border)
{
    if (border > 1) server_go(t->server);
    CHECK(server_wait_held(t->server, border));
    llmcb_loop_run_once(t->loop, 0);
    llmcb_loop_run_once(t->loop, 0);
}

/* A kept connection that dies with the next request: once more, silently. */
static void reused(int transport, server_end end)
{
    server_script s[3] = { script(KEPT, SERVER_KEEP), script("", end),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;

    fault_begin(&t, transport, s, 3);
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    fault_finish(&t, "start|kept|end", LLMCB_OK);
    fault_again(&t);
    fault_finish(&t, "start|clean|end", LLMCB_OK);
    CHECK_INT(server_requests(t.server), 3);
    CHECK_INT(server_connections(t.server), 2);
    if (server_requests(t.server) == 3) {
        CHECK_INT(server_request(t.server, 1)->conn, 0);
        CHECK_INT(server_request(t.server, 2)->conn, 1);
    }
    trial_end(&t);
}

TEST_ON_NET(fault_013_reused_closed)
{
    reused(transport, SERVER_CLOSE);
}

TEST_ON_NET(fault_013_reused_reset)
{
    reused(transport, SERVER_RST);
}

/* ... exactly once: when the new connection dies too, it is an error. */
TEST_ON_NET(fault_013_reused_once)
{
    server_script s[4] = { script(KEPT, SERVER_KEEP), script("", SERVER_CLOSE),
                           script("", SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;

    fault_begin(&t, transport, s, 4);
    trial_open(&t);
    trial_ask(&t);
    fault_finish(&t, "start|kept|end", LLMCB_OK);
    fault_again(&t);
    fault_finish(&t, "start|error:EIO", LLMCB_EIO);
    CHECK_INT(server_requests(t.server), 3);
    trial_end(&t);
}

/* A kept connection that dies in the middle of the answer is not replayed. */
TEST_ON_NET(fault_013_reused_began)
{
    server_script s[3] = { script(KEPT, SERVER_KEEP),
                           script(OK "Conte", SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;

    fault_begin(&t, transport, s, 3);
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    fault_finish(&t, "start|kept|end", LLMCB_OK);
    fault_again(&t);
    fault_finish(&t, "start|error:ETRUNCATED", LLMCB_ETRUNCATED);
    CHECK_INT(server_requests(t.server), 2);
    trial_end(&t);
}

/* ... and an interim answer is an answer that began: it ends as on a new
 * connection, and is not replayed. */
TEST_ON_NET(fault_013_reused_interim)
{
    int kept;

    for (kept = 0; kept < 2; kept++) {
        server_script s[3] = { script(KEPT, SERVER_KEEP),
                               script("HTTP/1.1 100 Continue\r\n\r\n",
                                      SERVER_CLOSE),
                               script(CLEAN, SERVER_CLOSE) };
        trial t;

        fault_begin(&t, transport, kept ? s : s + 1, kept ? 3 : 2);
        trial_open(&t);
        trial_ask(&t);
        if (kept) {
            fault_finish(&t, "start|kept|end", LLMCB_OK);
            fault_again(&t);
        }
        fault_finish(&t, "start|error:EIO", LLMCB_EIO);
        CHECK_INT(server_requests(t.server), 1 + kept);
        CHECK_INT(server_connections(t.server), 1);
        trial_end(&t);
    }
}

/* A byte of the head each second: what counts is when it is complete. */
TEST_ON_ALL(fault_024_header_trickle)
{
    server_segment gaps[15];
    server_script s[2] = { script(SSE "X-A: a\r\n\r\n" ALL, SERVER_STALL),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;
    size_t i;

    for (i = 0; i < 15; i++) {
        gaps[i].offset = i;
        gaps[i].delay_ms = transport == REPLAY ? 1000 : SERVER_HOLD;
    }
    s[0].segments = gaps;
    s[0].n_segments = 15;
    fault_begin(&t, transport, s, 2);
    sys.still = true;
    t.cd.first_byte_ms = 5000;
    trial_open(&t);
    trial_ask(&t);
    if (t.server) {
        turn_until_asked(&t);
        for (i = 1; i <= 5; i++) {
            let_server(&t, i);
            pass_ms(&t, 1000);
            CHECK(!llmcb_op_done(t.op));
        }
        pass_ms(&t, 1);
    }
    fault_finish(&t, "start|error:ETIMEDOUT", LLMCB_ETIMEDOUT);
    CHECK_INT(saw[0].error.detail, LLMCB_DETAIL_FIRST_BYTE);
    if (!t.server) CHECK_INT(llmcb_loop_now(t.loop), 5000);
    trial_end(&t);
}

/* The target of a redirect hears nothing. */
TEST_ON_NET(fault_029_second_server)
{
    static const int statuses[] = { 301, 302, 303, 307, 308 };
    server_script clean = script(CLEAN, SERVER_CLOSE);
    char bytes[256];
    server *second = server_start(&clean, 1);
    size_t i;

    REQUIRE(second);
    for (i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        server_script s[2] = { script(bytes, SERVER_KEEP), clean };
        trial t;

        snprintf(bytes, sizeof bytes,
                 "HTTP/1.1 %d Moved\r\nLocation: %s/chat/completions\r\n"
                 "Content-Length: 0\r\n\r\n",
                 statuses[i], server_base(second));
        fault_begin(&t, transport, s, 2);
        t.cd.max_retries = 2;
        trial_open(&t);
        trial_ask(&t);
        fault_finish(&t, "start|error:EREDIRECT", LLMCB_EREDIRECT);
        CHECK_INT(saw[0].error.http_status, statuses[i]);
        CHECK_INT(server_requests(t.server), 1);
        CHECK_INT(server_connections(second), 0);
        trial_end(&t);
    }
    server_stop(second);
}

/* An error text that is cut in the middle of an echoed key. */
TEST_ON_ALL(fault_030_key_echoed_and_cut)
{
    size_t pad;

    for (pad = 0; pad < 260; pad += transport == REPLAY ? 1 : 13) {
        bytes b = { NULL, 0, 0 };
        trial t;

        puts_to(&b, "HTTP/1.1 403 Forbidden\r\nX-Request-Id: ");
        fill(&b, 'r', pad);
        puts_to(&b, KEY "\r\n\r\n{\"error\":{\"message\":\"");
        fill(&b, 'm', pad);
        puts_to(&b, KEY "\",\"type\":\"");
        fill(&b, 't', pad);
        puts_to(&b, KEY "\",\"code\":\"");
        fill(&b, 'c', pad);
        puts_to(&b, KEY "\"}}");
        fault_start(&t, transport, script(b.p, SERVER_CLOSE));
        fault_finish(&t, "start|error:EHTTP", LLMCB_EHTTP);
        trial_end(&t);
        free(b.p);
    }
}

/* What the server says of the error counts, however its answer ends: it is
 * neither lost nor asked for again. */
TEST_ON_ALL(fault_030_status_401_cut)
{
    static const struct {
        const char *length;
        server_end end;
    } cuts[] = { { "Content-Length: 1000\r\n", SERVER_CLOSE },
                 { "Content-Length: 1000\r\n", SERVER_RST },
                 { "", SERVER_RST } };
    size_t i;

    for (i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        int before = test_failures_here;
        server_segment read;
        server_script s[2];
        char bytes[256];
        trial t;

        snprintf(bytes, sizeof bytes,
                 "HTTP/1.1 401 Unauthorized\r\n%s\r\n"
                 "{\"error\":{\"message\":\"no such key\"}}",
                 cuts[i].length);
        read = hold(strlen(bytes)); /* a reset takes what is not read */
        s[0] = held(bytes, cuts[i].end, &read, transport != REPLAY);
        s[1] = script(CLEAN, SERVER_CLOSE);
        fault_begin(&t, transport, s, 2);
        t.cd.max_retries = 2;
        trial_open(&t);
        trial_ask(&t);
        if (t.server) {
            turn_until_asked(&t);
            let_server(&t, 1);
            server_go(t.server);
        }
        fault_finish(&t, "start|error:EHTTP", LLMCB_EHTTP);
        CHECK_INT(saw[0].error.http_status, 401);
        CHECK(strstr(saw[0].error.message, "no such key"));
        if (t.server) CHECK_INT(server_requests(t.server), 1);
        trial_end(&t);
        if (before != test_failures_here)
            TEST_FAIL("cut %lu", (unsigned long)i);
    }
}

/* -- C: several tries */

/* All tries are the same request. */
TEST_ON_NET(fault_034_same_request)
{
    server_script s[3] = { script(AFTER_MS("0"), SERVER_KEEP),
                           script(FAIL("503", "retry-after-ms: 0\r\n"),
                                  SERVER_CLOSE),
                           script(CLEAN, SERVER_CLOSE) };
    char one[128], two[128];
    trial t;

    fault_begin(&t, transport, s, 3);
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    fault_finish(&t, "start|retry:1|retry:2|clean|end", LLMCB_OK);
    CHECK_INT(saw[0].failed[0].http_status, 429);
    CHECK_INT(saw[0].failed[1].http_status, 503);
    REQUIRE(server_requests(t.server) == 3);
    CHECK(server_header(server_request(t.server, 0), "Idempotency-Key", one,
                        sizeof one));
    CHECK(server_header(server_request(t.server, 2), "Idempotency-Key", two,
                        sizeof two));
    CHECK_STR(one, two);
    CHECK_STR(server_request(t.server, 0)->body,
              server_request(t.server, 2)->body);
    trial_end(&t);
}

TEST_ON_ALL(fault_036_back_off_grows)
{
    static const int64_t high[] = { 500, 1000, 2000, 4000, 8000, 8000, 8000 };
    server_script s[8];
    trial t;
    size_t i;

    for (i = 0; i < 7; i++) s[i] = script(FAIL("500", ""), SERVER_KEEP);
    s[7] = script(CLEAN, SERVER_CLOSE);
    fault_begin(&t, transport, s, 8);
    sys.still = true;
    t.cd.max_retries = 7;
    trial_open(&t);
    trial_ask(&t);
    for (i = 0; i < 7; i++) pass_delay(&t, (unsigned)i + 1);
    fault_finish(&t,
                 "start|retry:1|retry:2|retry:3|retry:4|retry:5|retry:6|"
                 "retry:7|clean|end",
                 LLMCB_OK);
    for (i = 0; i < 7; i++) {
        CHECK(saw[0].delay[i] > high[i] * 3 / 4 && saw[0].delay[i] <= high[i]);
        CHECK_INT(saw[0].attempt[i], i + 1);
        CHECK_INT(saw[0].failed[i].http_status, 500);
    }
    trial_end(&t);
}

TEST_ON_ALL(fault_037_exhausted)
{
    server_script s[4] = { script(FAIL("500", ""), SERVER_KEEP),
                           script(FAIL("502", ""), SERVER_KEEP),
                           script(FAIL("503", ""), SERVER_KEEP),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;

    fault_begin(&t, transport, s, 4);
    sys.still = true;
    t.cd.max_retries = 0; /* the default */
    trial_open(&t);
    trial_ask(&t);
    pass_delay(&t, 1);
    pass_delay(&t, 2);
    fault_finish(&t, "start|retry:1|retry:2|error:EHTTP", LLMCB_EHTTP);
    CHECK_INT(saw[0].error.http_status, 503);
    CHECK_INT(saw[0].error.attempt, 3);
    trial_end(&t);
}

/* Within one turn, since nobody has to be waited for. */
TEST_ON_ALL(fault_038_cancel_in_back_off)
{
    server_script s[2] = { script(AFTER("60"), SERVER_KEEP),
                           script(CLEAN, SERVER_CLOSE) };
    trial t;

    fault_begin(&t, transport, s, 2);
    sys.still = true;
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    trial_until(&t, 2);
    llmcb_op_cancel(t.op);
    if (t.server) {
        llmcb_loop_run_once(t.loop, 0);
        CHECK_INT(t.r[0]->finishes, 1);
        CHECK_INT(t.r[1]->finishes, 1);
    }
    fault_finish(&t, t.server ? "start|retry:1|error:ECANCELLED" : NULL,
                 LLMCB_ECANCELLED);
    CHECK_INT(saw[0].error.detail, LLMCB_DETAIL_CALLER);
    if (t.server) CHECK_INT(server_requests(t.server), 1);
    else CHECK_INT(llmcb_loop_now(t.loop), 0);
    trial_end(&t);
}

/* Whatever ends it: no retry once a byte of the answer has come. */
TEST_ON_ALL(fault_039_after_first_byte)
{
    static const struct {
        const char *bytes;
        server_end end;
        const char *log;
        llmcb_code code;
    } cases[] = {
        { CHUNKED "50\r\n" EV("Hel"), SERVER_RST, "start|Hel|error:EIO",
          LLMCB_EIO },
        { CHUNKED "50\r\n" EV("Hel"), SERVER_CLOSE,
          "start|Hel|error:ETRUNCATED", LLMCB_ETRUNCATED },
        { CHUNKED "50\r\n:", SERVER_RST, "start|error:EIO", LLMCB_EIO },
        { CHUNKED "50\r\n" EV("Hel"), SERVER_STALL,
          "start|Hel|error:ETIMEDOUT", LLMCB_ETIMEDOUT }
    };
    size_t i;

    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        server_segment end = hold(strlen(cases[i].bytes));
        server_script s[2] = { script(cases[i].bytes, cases[i].end),
                               script(CLEAN, SERVER_CLOSE) };
        trial t;

        if (transport != REPLAY) {
            s[0].segments = &end;
            s[0].n_segments = 1;
        }
        fault_begin(&t, transport, s, 2);
        sys.still = true;
        t.cd.max_retries = 5;
        t.cd.idle_ms = 100000;
        trial_open(&t);
        trial_ask(&t);
        if (t.server) {
            turn_until_asked(&t);
            let_server(&t, 1);
            trial_until(&t, count_of(cases[i].log, "Hel") ? 2 : 1);
            server_go(t.server);
            if (cases[i].end == SERVER_STALL) pass_ms(&t, 100001);
        }
        fault_finish(&t, cases[i].log, cases[i].code);
        if (t.server) CHECK_INT(server_requests(t.server), 1);
        trial_end(&t);
    }
}

/* 100 calls that all fail: each keeps to its own number of tries. */
TEST_ON_NET(fault_041_no_storm)
{
    server_script s[301];
    llmcb_op *ops[100];
    trial t;
    size_t i;

    for (i = 0; i < 300; i++)
        s[i] = script(FAIL("500", "retry-after-ms: 0\r\n"), SERVER_KEEP);
    s[300] = script(CLEAN, SERVER_CLOSE);
    fault_begin(&t, transport, s, 301);
    t.cd.max_retries = 2;
    t.cd.n_callbacks = 0;
    trial_open(&t);
    for (i = 0; i < 100; i++)
        ops[i] = llmcb_chat_generate(t.chat, &question, 1, NULL);
    CHECK_INT(llmcb_loop_run(t.loop), LLMCB_OK);
    for (i = 0; i < 100; i++) {
        CHECK_INT(llmcb_op_code(ops[i]), LLMCB_EHTTP);
        CHECK_INT(llmcb_op_error(ops[i])->attempt, 3);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(server_requests(t.server), 300);
    t.cd.n_callbacks = 3;
    trial_move(&t, t.cd.base_url);
    trial_end(&t);
}

/* -- D and E */

/* What comes behind a response, later, answers nobody's request. */
TEST_ON_NET(fault_066_late_surplus)
{
    static const char bytes[] = KEPT SSE
        "Content-Length: 74\r\n\r\n" EV("evil") DONE;
    server_segment border = hold(strlen(KEPT));
    trial t;

    fault_start(&t, transport, held(bytes, SERVER_KEEP, &border, 1));
    fault_finish(&t, "start|kept|end", LLMCB_OK);
    server_go(t.server);
    CHECK(server_wait_sent(t.server, 1));
    fault_again(&t);
    fault_finish(&t, "start|clean|end", LLMCB_OK);
    CHECK_INT(server_connections(t.server), 2);
    trial_end(&t);
}

/* HTTP/2 is never asked for in clear text, nor is an encoding. */
TEST_ON_NET(fault_067_no_upgrade)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    const server_req *q;
    char v[64];
    trial t;

    fault_begin(&t, transport, &s, 1);
    t.cd.http2 = true;
    trial_open(&t);
    trial_ask(&t);
    fault_finish(&t, "start|clean|end", LLMCB_OK);
    REQUIRE(server_requests(t.server) == 1);
    q = server_request(t.server, 0);
    CHECK(strstr(q->head, " HTTP/1.1\r\n"));
    CHECK(!server_header(q, "Upgrade", v, sizeof v));
    CHECK(!server_header(q, "HTTP2-Settings", v, sizeof v));
    CHECK(!server_header(q, "Accept-Encoding", v, sizeof v) ||
          strcmp(v, "identity") == 0);
    trial_end(&t);
}

/* Tokens are told when they come, not when the stream ends. */
TEST_ON_NET(fault_068_live)
{
    server_segment borders[2] = { hold(strlen(SSE "\r\n" EV("Hel"))),
                                  hold(strlen(SSE "\r\n" TWO)) };
    trial t;

    fault_start(&t, transport,
                held(SSE "\r\n" ALL, SERVER_CLOSE, borders, 2));
    trial_until(&t, 2);
    server_go(t.server);
    trial_until(&t, 3);
    server_go(t.server);
    fault_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    trial_end(&t);
}

/* Every pair of splits of a short stream. */
TEST(fault_068_pairs_replay)
{
    static const char b[] =
        OK "\r\n" BOM "data:{\"choices\":[{\"delta\":{\"content\":"
                      "\"\\ud83d\\ude00\xC3\xA9\"}}]}\r\n\r\n:c\r\r"
                      "data:[DONE]\n\n";
    llmcb_recording tape;
    llmcb_segment segs[3];
    size_t i, k, len = sizeof b - 1;
    trial t;

    memset(&tape, 0, sizeof tape);
    memset(segs, 0, sizeof segs);
    tape.bytes = b;
    tape.len = len;
    tape.segments = segs;
    tape.n_segments = 3;
    cuts_begin(&t, 0);
    for (i = 1; i < len && !test_failures_here; i += STRIDE)
        for (k = i; k < len && !test_failures_here; k += STRIDE) {
            segs[1].offset = i;
            segs[2].offset = k;
            cuts_play(&t, &tape, "start|\xF0\x9F\x98\x80\xC3\xA9|end",
                      LLMCB_OK);
            if (test_failures_here)
                TEST_FAIL("that was with splits at %lu and %lu",
                          (unsigned long)i, (unsigned long)k);
        }
    cuts_end(&t);
}

/* A CR at the end of a read ends the line without waiting for an LF. */
TEST_ON_NET(fault_069_cr_at_end_of_read)
{
#define PART_1 \
    SSE "\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\r"
#define PART_2 \
    "\ndata: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\r\n\r"
    server_segment borders[2] = { hold(strlen(PART_1)),
                                  hold(strlen(PART_1 PART_2)) };
    trial t;

    fault_start(&t, transport,
                held(PART_1 PART_2 "\n" MORE, SERVER_CLOSE, borders, 2));
    trial_until(&t, 2);
    server_go(t.server);
    trial_until(&t, 3);
    server_go(t.server);
    fault_finish(&t, "start|a|b||end", LLMCB_OK);
    trial_end(&t);
}

/* limits.event: a line, one like that before it, and an event of several
 * lines, below, at and above it. */
TEST_ON_ALL(fault_079_event_limit)
{
    static const char first[] = "data: {\"x\":1,\n";
    int over, shape;

    for (over = -1; over < 2; over++)
        for (shape = 0; shape < 3; shape++) {
            bytes b = { NULL, 0, 0 };
            server_script s[2];
            trial t;
            size_t cap = 4096, len = over < 0 ? cap - 1 : cap + (size_t)over;

            if (shape < 2) {
                make_line(&b, len, shape ? LINE_HEAD("\"index\":0,")
                                         : LINE_HEAD(""));
            } else { /* data lines that make len bytes with the LF between */
                static const char second[] =
                    "\"choices\":[{\"delta\":{\"content\":\"";
                puts_to(&b, SSE "\r\n" EV("Hel"));
                puts_to(&b, first);
                puts_to(&b, "data: ");
                puts_to(&b, second);
                fill(&b, 'y', len - strlen(first) + strlen("data: ") -
                                  strlen(second) - strlen("\"}}]}"));
                puts_to(&b, "\"}}]}\n\n" FIN DONE);
            }
            s[0] = script(b.p, SERVER_CLOSE);
            s[1] = script(CLEAN, SERVER_CLOSE);
            fault_begin(&t, transport, s, 2);
            t.cd.limits.event = cap;
            trial_open(&t);
            trial_ask(&t);
            if (over > 0) {
                fault_finish(&t, "start|Hel|error:ELIMIT", LLMCB_ELIMIT);
                CHECK(strstr(saw[0].error.message, "limits.event"));
            } else {
                trial_finish(&t, NULL, LLMCB_OK);
                CHECK_INT(t.r[0]->events, 5);
                CHECK(!saw[0].differs);
            }
            trial_end(&t);
            free(b.p);
        }
}

/* Comments and events without data are no progress. */
TEST_ON_ALL(fault_080_comments_for_ever)
{
    enum { N = 15 };
    bytes b = { NULL, 0, 0 };
    server_segment gaps[N];
    server_script s[2];
    trial t;
    size_t i;

    puts_to(&b, SSE "\r\n" EV("Hel"));
    for (i = 0; i < N; i++) {
        gaps[i].offset = b.len;
        gaps[i].delay_ms = transport == REPLAY ? 1000 : SERVER_HOLD;
        puts_to(&b, i % 2 ? ": ping\n\n" : "event: ping\ndata:\n\n");
    }
    s[0] = held(b.p, SERVER_STALL, gaps, N);
    s[1] = script(CLEAN, SERVER_CLOSE);
    fault_begin(&t, transport, s, 2);
    sys.still = true;
    t.cd.idle_ms = 10500;
    trial_open(&t);
    trial_ask(&t);
    if (t.server) {
        trial_until(&t, 2);
        for (i = 1; i <= 10; i++) {
            let_server(&t, i);
            pass_ms(&t, 1000);
        }
        pass_ms(&t, 500);
        CHECK(!llmcb_op_done(t.op));
        pass_ms(&t, 1);
    }
    fault_finish(&t, "start|Hel|error:ETIMEDOUT", LLMCB_ETIMEDOUT);
    CHECK_INT(saw[0].error.detail, LLMCB_DETAIL_IDLE);
    if (!t.server) CHECK_INT(llmcb_loop_now(t.loop), 10500);
    trial_end(&t);
    free(b.p);
}

/* The end is at [DONE]; a server that then says nothing more is left after
 * 100 ms. */
TEST_ON_NET(fault_081_done_then_open)
{
    static const char *const answers[] = {
        CHUNKED "1000\r\n" ALL, SSE "Content-Length: 9999\r\n\r\n" ALL,
        SSE "\r\n" ALL
    };
    size_t i;

    for (i = 0; i < 3; i++) {
        server_script s[2] = { script(answers[i], SERVER_STALL),
                               script(CLEAN, SERVER_CLOSE) };
        trial t;

        fault_begin(&t, transport, s, 2);
        sys.still = true;
        trial_open(&t);
        trial_ask(&t);
        fault_finish(&t, "start|Hel|lo||end", LLMCB_OK);
        trial_clean(&t); /* not on that connection */
        CHECK_INT(server_connections(t.server), 2);
        pass_ms(&t, 101);
        CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
        trial_close(&t);
    }
}

/* ... and one that ends its response is used again. */
TEST_ON_NET(fault_081_done_then_reused)
{
    bytes b = { NULL, 0, 0 };
    server_segment border;
    trial t;

    puts_to(&b, CHUNKED);
    frame_body(&b, ALL, false);
    border = hold(b.len);
    puts_to(&b, "0\r\n\r\n");
    fault_start(&t, transport, held(b.p, SERVER_KEEP, &border, 1));
    /* without the last chunk */
    fault_finish(&t, "start|Hel|lo||end", LLMCB_OK);
    server_go(t.server);
    CHECK(server_wait_sent(t.server, 1));
    llmcb_loop_run_once(t.loop, 0);
    llmcb_loop_run_once(t.loop, 0);
    trial_clean(&t);
    CHECK_INT(server_connections(t.server), 1);
    trial_close(&t);
    free(b.p);
}

/* ---- cancel -------------------------------------------------------------- */

/* The server notices, the tokens before it stand. */
TEST_ON_NET(fault_098_cancel_while_stalled)
{
    trial t;

    fault_start(&t, transport, script(SSE "\r\n" TWO, SERVER_STALL));
    trial_until(&t, 3);
    llmcb_op_cancel(t.op);
    fault_finish(&t, "start|Hel|lo|error:ECANCELLED", LLMCB_ECANCELLED);
    CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
    llmcb_op_cancel(t.op); /* late: nothing */
    trial_end(&t);
}

TEST_ON_NET(fault_098_cancel_before_answer)
{
    trial t;

    fault_start(&t, transport, script("", SERVER_STALL));
    turn_until_asked(&t);
    trial_until(&t, 1);
    llmcb_op_cancel(t.op);
    fault_finish(&t, "start|error:ECANCELLED", LLMCB_ECANCELLED);
    CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
    trial_end(&t);
}

/* Freeing the operation is a cancel too: the handlers are told. */
TEST_ON_NET(fault_098_free_while_stalled)
{
    trial t;

    fault_start(&t, transport, script(SSE "\r\n" TWO, SERVER_STALL));
    trial_until(&t, 3);
    llmcb_op_free(t.op);
    t.op = NULL;
    while (llmcb_loop_alive(t.loop) && !sys.hung) trial_turn(&t);
    CHECK(!sys.hung);
    CHECK_STR(t.r[0]->log, "start|Hel|lo|error:ECANCELLED");
    CHECK_STR(t.r[1]->log, t.r[0]->log);
    CHECK_STR(t.r[2]->log, t.r[0]->log);
    CHECK_INT(saw[0].error.detail, LLMCB_DETAIL_CONSUMER);
    CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
    trial_end(&t);
}

/* ---- credentials --------------------------------------------------------- */

/* Refused before anything ran: the chat says so, and so does every call. */
static void check_refused(const llmcb_chat_desc *d, const char *secret)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    llmcb_prompt prompt;
    llmcb_chat_desc mine = *d;
    llmcb_chat *chat;
    llmcb_op *ops[3];
    size_t i;
    trial t;

    fault_begin(&t, SOCK, &s, 1);
    trial_open(&t);
    mine.transport = t.tr;
    if (!mine.base_url) mine.base_url = server_base(t.server);
    mine.callbacks = t.callbacks;
    mine.n_callbacks = 3;
    chat = llmcb_chat_new(t.loop, &mine);
    REQUIRE(chat);
    CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_EINVAL);
    CHECK(!strstr(llmcb_chat_error(chat)->message, secret));
    prompt.messages = &question;
    prompt.n = 1;
    ops[0] = llmcb_chat_generate(chat, &question, 1, NULL);
    ops[1] = llmcb_chat_stream(chat, &question, 1, NULL);
    ops[2] = llmcb_chat_batch(chat, &prompt, 1, NULL);
    for (i = 0; i < 3; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_EINVAL);
        CHECK_STR(llmcb_op_error(ops[i])->message,
                  llmcb_chat_error(chat)->message);
        CHECK_INT(t.r[i]->events, 0);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(server_connections(t.server), 0);
    llmcb_chat_free(chat);
    trial_end(&t);
}

TEST(header_injection_is_refused)
{
    static const char *const bad[] = {
        "sk-secret\r\nX-Evil: 1", "sk-secret\n", "sk-secret\r", "\nsk-secret",
        "sk-sec ret",  " sk-secret",  "sk-secret ", "sk-secret\x01",
        "sk-secret\x7F", "sk-secret\x80", "sk-secret\t", "sk-secr\xC3\xA9t"
    };
    llmcb_chat_desc d;
    llmcb_pair header;
    bytes big = { NULL, 0, 0 };
    size_t i;

    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        int before = test_failures_here;
        memset(&d, 0, sizeof d);
        d.api_key = bad[i];
        check_refused(&d, "secr");
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        d.organization = bad[i];
        check_refused(&d, "secr");
        if (before != test_failures_here)
            TEST_FAIL("that was value %lu", (unsigned long)i);
    }
    fill(&big, 'k', 1000000);
    memset(&d, 0, sizeof d);
    d.api_key = big.p;
    check_refused(&d, "kkkk");
    d.api_key = KEY;
    d.organization = big.p;
    check_refused(&d, "kkkk");
    free(big.p);
    /* further headers: values may have blanks */
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *c;
        bool control = false;
        for (c = bad[i]; *c; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7F) control = true;
        if (!control) continue;
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        header.key = "X-Mine";
        header.value = bad[i];
        d.headers = &header;
        d.n_headers = 1;
        check_refused(&d, "secr");
    }
    for (i = 0; i < 8; i++) {
        static const char *const names[] = { "X-A:", "X A", "X-A\r\nB", "",
                                             "Host", "content-length",
                                             "Transfer-Encoding", "X\x80" };
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        header.key = names[i];
        header.value = "secret";
        d.headers = &header;
        d.n_headers = 1;
        check_refused(&d, "secret");
    }
}

TEST(bad_addresses_are_refused)
{
    static const char *const bad[] = {
        "https://user:secret@127.0.0.1/v1", "http://secret@127.0.0.1/v1",
        "ftp://127.0.0.1/secret", "file:///secret", "127.0.0.1/secret", "",
        "http://127.0.0.1/v1\r\nX-Evil: secret", "http://127.0.0.1/sec ret",
        "http:///secret", "http://127.0.0.1:99999/secret",
        "http://127.0.0.1:0/secret", "http://127.0.0.1:x/secret",
        "http://127.0.0.1#secret", "http://[::1/secret", "unix:", "unix::/v1",
        "unix:/tmp/x:secret", "unix:/tmp/no-target"
    };
    size_t i;

    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        llmcb_chat_desc d;
        int before = test_failures_here;
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        d.base_url = bad[i];
        check_refused(&d, "secret");
        if (before != test_failures_here)
            TEST_FAIL("that was \"%s\"", bad[i]);
    }
}

/* A key goes out in clear text to this machine only, unless allowed. */
TEST(key_in_clear_text)
{
    static const struct {
        const char *url;
        bool ok;
    } cases[] = {
        { "http://example.com/v1", false },
        { "http://127.evil.example/v1", false },
        { "http://127.0.0.1.evil.example/v1", false },
        { "http://127.0.0.1.5/v1", false }, /* no numbers: names, too */
        { "http://127.0.0.256/v1", false },
        { "http://127.0.0.01/v1", false },
        { "http://127.0..1/v1", false },
        { "http://127.0.0./v1", false },
        { "http://localhost.evil.example/v1", false },
        { "http://10.0.0.1/v1", false },
        { "http://0.0.0.0/v1", false },
        { "http://[2001:db8::1]/v1", false },
        { "HTTP://example.com/v1", false },
        { "http://127.0.0.1:8080/v1", true },
        { "http://127.1.2.3/v1", true },
        { "http://localhost/v1", true },
        { "http://LOCALHOST:1/v1", true },
        { "http://[::1]:8080/v1", true },
        { "unix:/run/x.sock:/v1", true },
        { "https://example.com/v1", true },
    };
    server_script s = script(CLEAN, SERVER_CLOSE);
    size_t i;
    trial t;

    fault_begin(&t, REPLAY, &s, 1);
    trial_open(&t);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        llmcb_chat_desc d;
        llmcb_chat *chat;
        int before = test_failures_here;

        memset(&d, 0, sizeof d);
        d.base_url = cases[i].url;
        d.api_key = KEY;
        chat = llmcb_chat_new(t.loop, &d);
        CHECK_INT(llmcb_chat_error(chat)->code,
                  cases[i].ok ? LLMCB_OK : LLMCB_EINVAL);
        if (!cases[i].ok && cases[i].url[0] == 'h')
            CHECK(strstr(llmcb_chat_error(chat)->message, "clear text"));
        llmcb_chat_free(chat);
        if (cases[i].url[0] == 'h') {
            d.allow_cleartext_key = true;
            chat = llmcb_chat_new(t.loop, &d);
            CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_OK);
            llmcb_chat_free(chat);
            d.allow_cleartext_key = false;
            d.api_key = "";
            chat = llmcb_chat_new(t.loop, &d);
            CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_OK);
            llmcb_chat_free(chat);
        }
        if (before != test_failures_here)
            TEST_FAIL("that was %s", cases[i].url);
    }
    trial_end(&t);
}

TEST(https_needs_libcurl)
{
    server_script s = script(CLEAN, SERVER_CLOSE);
    trial t;

    fault_begin(&t, SOCK, &s, 1);
    t.cd.base_url = "https://127.0.0.1:1/v1";
    t.cd.max_retries = 2;
    trial_open(&t);
    trial_ask(&t);
    fault_finish(&t, "start|error:ETLS", LLMCB_ETLS);
    CHECK(strstr(saw[0].error.message, "LLMCB_NO_CURL"));
    trial_move(&t, server_base(t.server));
    trial_end(&t);
}

/* What the environment says of proxies is nothing to a plain call. */
TEST_ON_NET(fault_110_proxy_environment)
{
    static const char *const names[] = { "http_proxy", "HTTP_PROXY",
                                         "all_proxy", "ALL_PROXY" };
    server_script clean = script(CLEAN, SERVER_CLOSE);
    server *proxy = server_start(&clean, 1);
    size_t i;
    trial t;

    REQUIRE(proxy);
    for (i = 0; i < 4; i++) setenv(names[i], server_base(proxy), 1);
    fault_start(&t, transport, clean);
    fault_finish(&t, "start|clean|end", LLMCB_OK);
    CHECK_INT(server_requests(t.server), 1);
    CHECK_INT(server_connections(proxy), 0);
    trial_end(&t);
    for (i = 0; i < 4; i++) unsetenv(names[i]);
    server_stop(proxy);
}

int main(int argc, char **argv)
{
    alarm(160); /* what hangs is killed */
    return test_main(argc, argv);
}
