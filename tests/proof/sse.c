/* [SSE]: the framer. One call from any state that it can be in, with up to N
 * bytes of input, and lines kept in buffers of any fill. */
/* reached: 90 */
/* eva: -eva-widening-delay 60 */
/* eva: -eva-slevel-function llmcbi_buf_add:20,llmcbi_buf_reserve:20 */
/* eva: -eva-slevel-function llmcbi_sse_line:200,llmcbi_sse_data:100,next:200 */
/* eva: -eva-slevel-function llmcbi_sse_next:6000 */
/* eva: -inline-calls llmcbi_sse_bom,llmcbi_sse_eol,proof_memchr */
#include "proof.h"
#define N 3
#define CAP 16

static llmcbi_sse any_sse(int bom, bool in_data)
{
    llmcbi_sse s;

    memset(&s, 0, sizeof s);
    s.limit = any_size();
    s.bom = (uint8_t)bom;
    s.skip_lf = any_bool();
    s.in_data = in_data;
    s.is_error = any_bool();
    s.told = any_bool();
    return s;
}

/* A call with n bytes. So many of data and of a line are held, and there is
 * room for all: that buffers grow is shown in base.c and below. */
static void next(int n, int lines, int data, bool in_data, int bom)
{
    llmcbi_sse s = any_sse(bom, in_data);
    llmcbi_sse_status status;
    llmcb_str event;
    const char *p, *end;

    s.held = any_buf(CAP, data + lines);
    s.n_data = data;
    if (lines) s.told = false;
    p = any_bytes(n);
    end = p + n;
    status = llmcbi_sse_next(&proof_alloc, &s, &p, end, &event);
    /*@ assert place: p <= end; */
    /*@ assert data: s.n_data <= s.held.len; */
    /*@ assert held: s.held.len < s.held.cap; */
    if (status == LLMCBI_SSE_EVENT) llmcbi_str_is(event, "[DONE]");
    llmcbi_sse_free(&proof_alloc, &s);
}

static void first(void)
{
    int n = Frama_C_interval(0, N), bom = Frama_C_interval(0, 3);

    /*@ split n; */
    /*@ split bom; */
    next(n, 0, 0, false, bom);
}

static void in_line(void)
{
    int n = Frama_C_interval(0, N), lines = Frama_C_interval(1, 3);
    int in_data = Frama_C_interval(0, 1);

    /*@ split n; */
    /*@ split lines; */
    /*@ split in_data; */
    next(n, lines, in_data, in_data, 3);
}

static void in_event(void)
{
    int n = Frama_C_interval(0, N), data = Frama_C_interval(0, 2);

    /*@ split n; */
    /*@ split data; */
    next(n, 0, data, true, 3);
}

/* A line by itself, with a buffer that has to grow, and may not. */
static void line(void)
{
    int n = Frama_C_interval(0, 8), data = Frama_C_interval(-1, 2);
    int in_data = Frama_C_interval(0, 1), fail = Frama_C_interval(0, 1);
    int here = Frama_C_interval(-1, 0);
    llmcbi_sse s;
    llmcb_str event, line = { NULL, 0 };

    /*@ split n; */
    /*@ split data; */
    /*@ split in_data; */
    /*@ split fail; */
    /*@ split here; */
    if (in_data ? data < 0 || here >= 0 : data > 0) return;
    s = any_sse(3, in_data);
    if (data >= 0) s.held = any_buf(3, data);
    s.n_data = s.held.len;
    if (here >= 0) line = llmcbi_slice(any_bytes(here), here);
    proof_fail_at = fail;
    if (n == 8)
        llmcbi_sse_gather(&proof_alloc, &s, &line);
    else
        llmcbi_sse_line(&proof_alloc, &s, &line, llmcbi_slice(any_bytes(n), n),
                        &event);
    llmcbi_sse_free(&proof_alloc, &s);
}

int main(void)
{
    switch (WHICH(3)) {
    case 0: first(); break;
    case 1: in_line(); break;
    case 2: in_event(); break;
    default: line(); break;
    }
    return 0;
}
