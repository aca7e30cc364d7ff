/* [BASE]: UTF-8, cleaned copies, errors, numbers, buffers, words. */
/* reached: 85 */
/* eva: -eva-auto-loop-unroll 40 */
/* eva: -eva-slevel-function llmcbi_decimal:100,bytes:1000 */
/* eva: -eva-slevel-function llmcbi_str_listed:500,llmcbi_buf_add:20 */
/* eva: -eva-slevel-function llmcbi_buf_reserve:20 */
/* eva: -inline-calls llmcbi_put_byte,llmcbi_carry_flush */
/* eva: -inline-calls llmcbi_put_replacement */
#include "proof.h"
#define N 6

static void copy(void)
{
    int n = Frama_C_interval(0, N), cap = Frama_C_interval(1, 6);
    char *in, *out;

    /*@ split n; */
    /*@ split cap; */
    in = any_bytes(n);
    out = (char *)malloc(cap);
    llmcbi_utf8_valid(in, n);
    llmcbi_copy_clean(out, cap, in, n);
}

static void errors(void)
{
    int n = Frama_C_interval(1, 3), fail = Frama_C_interval(0, 1);
    int part = Frama_C_interval(0, 2), code;
    llmcb_error e;
    char *text;

    /*@ split n; */
    /*@ split fail; */
    /*@ split part; */
    code = part == 0   ? Frama_C_interval(LLMCB_ETOOL, LLMCB_OK)
           : part == 1 ? Frama_C_interval(1, 2147483647)
                       : Frama_C_interval(-2147483647 - 1, LLMCB_ETOOL - 1);
    proof_fail_at = fail;
    llmcbi_error_const((llmcb_code)code);
    llmcbi_code_of(code);
    text = any_text(n);
    *text = Frama_C_char_interval(1, 127);
    llmcbi_error_set(&e, LLMCB_EAPI, text);
    llmcbi_error_drop(&proof_alloc, llmcbi_error_keep(&proof_alloc, &e));
}

static void numbers(void)
{
    char digits[24];
    llmcbi_random r;
    char id[37];

    llmcbi_decimal(digits, Frama_C_long_long_interval(INT64_MIN, INT64_MAX));
    Frama_C_make_unknown((char *)&r, sizeof r);
    llmcbi_uuid(&r, id);
    llmcbi_uuid_valid(id);
}

/* A byte at a time, from all that may have come before: any text. */
static void bytes(void)
{
    int kind = Frama_C_interval(0, 8), n = Frama_C_interval(0, 3);
    int high = Frama_C_interval(0, 1);
    llmcbi_carry c;
    size_t room;
    char *out, *end;

    /*@ split kind; */
    /*@ split n; */
    /*@ split high; */
    if (kind ? n == 0 || n >= CARRY_SIZE(kind) : n > 0) return;
    c = any_carry(kind, n, high);
    room = kind ? 6 : 3;
    out = (char *)malloc(room);
    end = llmcbi_put_byte(out, &c, Frama_C_unsigned_char_interval(0, 255));
    /*@ assert carry: c.n <= 3; */
    /*@ assert paid: (end - out) + (c.n > 0 ? 3 : 0) <= room; */
    out = (char *)malloc(6);
    llmcbi_carry_flush(out, &c);
    out = (char *)malloc(4);
    llmcbi_put_utf8(out, Frama_C_unsigned_int_interval(0, 0xFFFFFFFF));
}

static void words(void)
{
    int n = Frama_C_interval(0, N), m = Frama_C_interval(36, 38);
    llmcb_str s;
    char *t;

    /*@ split n; */
    s = llmcbi_slice(any_bytes(n), n);
    t = any_text(n);
    llmcbi_str_is(s, "abc");
    llmcbi_str_is_nocase(s, "close");
    llmcbi_str_is_nocase(s, t);
    llmcbi_str_listed(s, "a bc close");
    llmcbi_str_begins(t, "http");
    llmcbi_clean_text(t);
    llmcbi_uuid_valid(t);
    /*@ split m; */
    llmcbi_uuid_valid(any_text(m));
}

static void buffers(void)
{
    int cap = Frama_C_interval(0, 3), len = Frama_C_interval(0, 3);
    int n = Frama_C_interval(0, N), fail = Frama_C_interval(0, 1);
    int failed = Frama_C_interval(0, 1);
    llmcbi_buf b;

    /*@ split cap; */
    /*@ split len; */
    /*@ split n; */
    /*@ split failed; */
    if (len >= cap && cap) return;
    b = any_buf(cap, len);
    b.failed = failed;
    /*@ split fail; */
    proof_fail_at = fail;
    llmcbi_buf_add(&proof_alloc, &b, any_bytes(n), n);
    /*@ assert room: b.cap == 0 || b.len < b.cap; */
    llmcbi_buf_str(&b);
}

int main(void)
{
    switch (WHICH(5)) {
    case 0: copy(); break;
    case 1: errors(); break;
    case 2: numbers(); break;
    case 3: bytes(); break;
    case 4: words(); break;
    default: buffers(); break;
    }
    return 0;
}
