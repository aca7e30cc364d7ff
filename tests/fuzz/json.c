/* [JSON]: what the reader accepts is what a second one accepts, walked,
 * skipped or read raw; decoding stays within its bound, is UTF-8 and survives
 * being written and read again. Option: which containers are skipped. */
#include "fuzz.h"

/* The inside of a string: decoded, and into *plain. */
static void decode(llmcbi_buf *plain, llmcb_str s)
{
    char *out = (char *)malloc(3 * s.len + 6), *end, rest[16];
    llmcbi_carry c;
    size_t n;

    memset(&c, 0, sizeof c);
    if (!out) abort();
    n = llmcbi_json_decode(out, s.ptr, s.len, &c);
    FUZZ_CHECK(n <= 3 * s.len + 6);
    FUZZ_CHECK(llmcbi_utf8_valid(out, n));
    fuzz_note(plain, out, n);
    end = llmcbi_carry_flush(rest, &c);
    fuzz_note(plain, rest, (size_t)(end - rest));
    free(out);
}

static void check_string(const llmcbi_json *j)
{
    llmcb_str s = fuzz_slice(j->str, j->len);
    llmcbi_buf plain, again, quoted, whole;
    llmcbi_json k;
    char *exact;
    size_t i, high = 0;

    memset(&plain, 0, sizeof plain);
    again = quoted = whole = plain;
    for (i = 0; i < s.len; i++)
        high += (unsigned char)s.ptr[i] >= 0x80;
    FUZZ_CHECK(j->high == (high > 0));
    FUZZ_CHECK(j->escaped == (s.len && memchr(s.ptr, '\\', s.len) != NULL));
    decode(&plain, s);
    if (!j->escaped && !j->high)
        FUZZ_CHECK(llmcbi_str_equal(s, llmcbi_buf_str(&plain)));
    llmcbi_json_text(&fuzz_plain, &whole, j);
    FUZZ_CHECK(fuzz_same(&whole, &plain));
    FUZZ_CHECK(j->len > 40 || llmcbi_json_is_text(j, llmcbi_buf_str(&plain)) ||
               plain.len == 0 || !llmcbi_utf8_valid(s.ptr, s.len) ||
               strstr(plain.ptr, "\xEF\xBF\xBD"));
    /* written and read again */
    s = llmcbi_buf_str(&plain);
    llmcbi_buf_print(&fuzz_plain, &quoted, "\"%J\"", &s);
    exact = fuzz_copy(quoted.ptr, quoted.len);
    FUZZ_CHECK(fuzz_json_valid(fuzz_slice(exact, quoted.len)));
    llmcbi_json_init(&k, exact, quoted.len);
    FUZZ_CHECK(llmcbi_json_next(&k) == LLMCBI_JSON_STRING);
    decode(&again, fuzz_slice(k.str, k.len));
    FUZZ_CHECK(llmcbi_json_whole(&k));
    FUZZ_CHECK(fuzz_same(&plain, &again));
    free(exact);
    fuzz_drop(&plain);
    fuzz_drop(&again);
    fuzz_drop(&quoted);
    fuzz_drop(&whole);
}

static void check_number(const llmcbi_json *j)
{
    int64_t v = 0;
    char text[24], *end;
    bool whole = llmcbi_json_int(j, &v);
    size_t i, digits = 0, begin;

    for (i = 0; i < j->len; i++)
        digits += j->str[i] >= '0' && j->str[i] <= '9';
    begin = j->str[0] == '-';
    if (digits + begin < j->len && whole) { /* 7.00 is, 7.01 and 7e2 are not */
        while (begin < j->len && j->str[begin] != '.') begin++;
        FUZZ_CHECK(begin < j->len);
        for (begin++; begin < j->len; begin++)
            FUZZ_CHECK(j->str[begin] == '0');
        return;
    }
    if (digits > 18) return; /* may be too large, or not */
    memcpy(text, j->str, j->len < 23 ? j->len : 23);
    text[j->len < 23 ? j->len : 23] = '\0';
    if (digits + (j->str[0] == '-') == j->len)
        FUZZ_CHECK(whole && v == strtoll(text, &end, 10) && !*end);
}

/* How the document ends, with containers skipped as the bits say. */
static bool walk(llmcb_str s, unsigned skips, bool look)
{
    llmcbi_json_type type;
    llmcbi_json j;
    unsigned n = 0;

    llmcbi_json_init(&j, s.ptr, s.len);
    do {
        type = llmcbi_json_next(&j);
        FUZZ_CHECK(j.p <= j.end && j.depth <= LLMCBI_JSON_DEPTH);
        if (look && (type == LLMCBI_JSON_STRING || type == LLMCBI_JSON_KEY))
            check_string(&j);
        if (look && type == LLMCBI_JSON_NUMBER) check_number(&j);
        if (skips >> (n++ & 7) & 1) llmcbi_json_skip(&j, type);
    } while (type != LLMCBI_JSON_ERROR && type != LLMCBI_JSON_END);
    FUZZ_CHECK(llmcbi_json_next(&j) == type);
    return type == LLMCBI_JSON_END;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    unsigned skips = fuzz_byte(&in);
    llmcb_str s = fuzz_rest(&in);
    char *exact = fuzz_copy(s.ptr, s.len);
    llmcbi_json j;
    bool valid;

    s.ptr = exact;
    valid = fuzz_json_valid(s);
    FUZZ_CHECK(walk(s, 0, true) == valid);
    FUZZ_CHECK(walk(s, skips, false) == valid);
    llmcbi_json_init(&j, s.ptr, s.len);
    if (llmcbi_json_raw(&j) != LLMCBI_JSON_ERROR && llmcbi_json_whole(&j))
        FUZZ_CHECK(valid);
    else
        FUZZ_CHECK(!valid);
    free(exact);
    return 0;
}
