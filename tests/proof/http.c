/* [HTTP]: the response parser, one step from any state; its pieces by
 * themselves; Retry-After. */
/* reached: 90 */
/* eva: -eva-auto-loop-unroll 40 */
/* eva: -eva-widening-delay 60 */
/* eva: -eva-slevel-function llmcbi_buf_add:20,llmcbi_buf_reserve:20 */
/* eva: -eva-slevel-function llmcbi_h1_chunks:300 */
/* eva: -inline-calls llmcbi_h1_field,llmcbi_h1_head,llmcbi_h1_line */
/* eva: -inline-calls proof_memchr,llmcbi_trim */
/* eva: -eva-slevel-function llmcbi_h1_next:3000,llmcbi_h1_header:500 */
/* eva: -eva-slevel-function values:50,fields:50,llmcbi_number:100 */
#include "proof.h"
#define N 3
#define CAP 8

static llmcbi_h1 any_h1(int state, int kept)
{
    llmcbi_h1 h;

    memset(&h, 0, sizeof h);
    h.max_line = any_size();
    h.max_block = any_size();
    h.max_fields = any_size();
    h.max_body = any_size();
    h.line = any_buf(kept < 0 ? 0 : CAP, kept < 0 ? 0 : kept);
    h.block = any_size();
    h.fields = any_size();
    h.interims = any_size();
    h.extension = any_size();
    h.left = any_size();
    h.body = any_size();
    h.framing = any_size();
    h.status = Frama_C_interval(0, 999);
    h.digits = Frama_C_interval(0, 16);
    h.state = (uint8_t)state;
    h.begun = any_bool();
    h.interim = any_bool();
    h.chunked = any_bool();
    h.has_length = any_bool();
    h.close = any_bool();
    h.close_said = any_bool();
    return h;
}

/* The buffer has room for all: that it grows is shown in base.c. */
static void step(int n, int state, int kept)
{
    llmcbi_h1 h = any_h1(state, kept);
    const char *p = any_bytes(n), *end = p + n;
    llmcbi_found found;

    llmcbi_h1_next(&proof_alloc, &h, &p, end, &found);
    /*@ assert place: p <= end; */
    /*@ assert state: h.state <= LLMCBI_H1_AT_ERROR; */
    /*@ assert line: h.line.cap == 0 || h.line.len < h.line.cap; */
    /*@ assert digits: 0 <= h.digits <= 17; */
    llmcbi_h1_eof(&h);
    llmcbi_h1_why(&h);
    llmcbi_h1_free(&proof_alloc, &h);
}

static void body(void)
{
    int n = Frama_C_interval(0, N), state = Frama_C_interval(2, 12);

    /*@ split n; */
    /*@ split state; */
    if (state == LLMCBI_H1_AT_TRAILER) return;
    step(n, state, 0);
}

static void head(void)
{
    int n = Frama_C_interval(0, N), state = Frama_C_interval(0, 2);
    int kept = Frama_C_interval(0, CAP - N - 1);

    /*@ split n; */
    /*@ split state; */
    /*@ split kept; */
    step(n, state == 2 ? LLMCBI_H1_AT_TRAILER : state, kept);
}

static void lines(void)
{
    int n = Frama_C_interval(0, 14);
    llmcbi_field field;
    llmcbi_h1 h;

    /*@ split n; */
    h = any_h1(LLMCBI_H1_AT_STATUS, -1);
    llmcbi_h1_status_line(&h, llmcbi_slice(any_bytes(n), n));
    llmcbi_h1_field(llmcbi_slice(any_bytes(n), n), &field);
}

static void values(void)
{
    int n = Frama_C_interval(0, 20), m = Frama_C_interval(0, 5);
    llmcbi_field field;
    llmcbi_h1 h;

    /*@ split n; */
    h = any_h1(LLMCBI_H1_AT_HEADER, -1);
    llmcbi_h1_length(&h, llmcbi_slice(any_bytes(n), n));
    /*@ split m; */
    if (n) return;
    llmcbi_has_word(llmcbi_slice(any_bytes(m), m), "close");
    h = any_h1(LLMCBI_H1_AT_HEADER, -1);
    llmcbi_h1_header(&h, llmcbi_slice(any_bytes(m), m), &field);
}

/* Fields that mean something, with any value. */
static void fields(void)
{
    static const char *const names[] = { "content-length:",
                                         "Transfer-Encoding:",
                                         "Transfer-Encoding:chunke",
                                         "connection:", "connection:clos" };
    static const int most[] = { 2, 1, 1, 2, 1 };
    int name = Frama_C_interval(0, 4), less = Frama_C_interval(0, 1);
    size_t len, n;
    llmcbi_field field;
    llmcbi_h1 h;
    char *s;

    /*@ split name; */
    /*@ split less; */
    len = strlen(names[name]);
    n = len + most[name] - less;
    s = any_bytes(n);
    memcpy(s, names[name], len);
    h = any_h1(LLMCBI_H1_AT_HEADER, 0);
    llmcbi_h1_header(&h, llmcbi_slice(s, n), &field);
}

static void chunk(void)
{
    int n = Frama_C_interval(0, 14);
    const char *p, *end;
    llmcb_str data[LLMCBI_H1_PIECES];
    llmcbi_h1 h;

    /*@ split n; */
    h = any_h1(LLMCBI_H1_AT_SIZE, -1);
    p = any_bytes(n);
    end = p + n;
    llmcbi_h1_chunks(&h, &p, end, data);
    /*@ assert place: p <= end; */
}

static void retry(void)
{
    int n = Frama_C_interval(0, 30);
    llmcb_str s;
    llmcbi_random r;

    /*@ split n; */
    s = llmcbi_slice(any_bytes(n), n);
    llmcbi_retry_after(s, Frama_C_long_long_interval(0, INT64_MAX / 2));
    Frama_C_make_unknown((char *)&r, sizeof r);
    llmcbi_backoff(&r, Frama_C_interval(0, 1000));
}

int main(void)
{
    switch (WHICH(6)) {
    case 0: body(); break;
    case 1: head(); break;
    case 2: lines(); break;
    case 3: values(); break;
    case 4: chunk(); break;
    case 5: retry(); break;
    default: fields(); break;
    }
    return 0;
}
