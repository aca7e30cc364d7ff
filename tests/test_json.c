/* [JSON]: the pull reader against a corpus and against a second reader, the
 * decoder, the writer. What is read ends at memory that cannot be read. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_KIT -DLLMCB_NO_SOCKETS */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mmap with MAP_ANONYMOUS */
#endif
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#include "../llmcb.h"
#include "test.h"
#include <sys/mman.h>

/* ---- guard pages ---------------------------------------------------------*/

#define PAGES ((size_t)1 << 16)

/* Copies s to where the byte behind it, or the byte before, is a trap. */
static const char *guarded(const char *s, size_t n, bool at_end)
{
    static char *base;

    if (!base) {
        base = mmap(NULL, 3 * PAGES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
                    -1, 0);
        if (base == MAP_FAILED || n > PAGES ||
            mprotect(base + PAGES, PAGES, PROT_READ | PROT_WRITE) != 0)
            abort();
    }
    return memcpy(base + (at_end ? 2 * PAGES - n : PAGES), s, n);
}

/* ---- the corpus ----------------------------------------------------------*/

typedef struct doc {
    const char *text;
    size_t len;
} doc;

#define D(s) { s, sizeof(s) - 1 }

static const doc accepted[] = {
    D("[]"), D("{}"), D("[[]]"), D("[{}]"), D("{\"\":[]}"), D("null"),
    D("true"), D("false"), D("0"), D("-0"), D("\"\""), D("\"a\""),
    D(" [ ] "), D("\t\n\r [\t\n\r 1\t\n\r ]\t\n\r "), D("[ 1 , 2 ]"),
    D("{ \"a\" : 1 }"), D("{\"a\":1,\"b\":2}"), D("{\"a\":1,\"a\":2}"),
    D("{\"a\":{\"b\":{\"c\":[]}}}"), D("[null,true,false,1,\"\"]"),
    D("[1]"), D("[-1]"), D("[123]"), D("[0.5]"), D("[-0.5]"), D("[0.0]"),
    D("[1e1]"), D("[1E1]"), D("[1e+1]"), D("[1e-1]"), D("[1.5e10]"),
    D("[0e0]"), D("[0E+0]"), D("[-0e-0]"), D("[123.456e78]"), D("[1E01]"),
    D("[-123]"), D("[20e1]"), D("[1.0000000000000000000000000000001]"),
    D("[1e999]"), D("[-1e999]"), D("[1e-999]"),
    D("[100000000000000000000000000]"), D("[0.4e006690]"),
    D("[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"]"), D("[\"\\u0000\"]"),
    D("[\"\\u0012\\uABCD\\uabcd\\uFfFf\"]"), D("[\"\\u005C\\u0022\"]"),
    D("[\"\\uD83D\\uDE00\"]"), D("[\"\\ud83d\\ude00\"]"),
    D("[\"a/*b*/c//d#e\"]"), D("[\"\\\\a\"]"), D("[\"\\\\n\"]"),
    D("[\"\x7F\"]"), D("[\"'\"]"), D("[\"\xC3\xA9\xE2\x82\xAC\"]"),
    D("[\"\xF0\x9F\x98\x80\"]"), D("[\"\xE2\x80\xA8\xE2\x80\xA9\"]"),
    D("[\"\xF4\x8F\xBF\xBF\"]"), D("[\"\xEF\xBB\xBF\"]"),
    D("{\"a\\u0000b\":0}"), D("{\"\xC3\xA9\":0}"), D("{\"\\u006e\":1}"),
    D("[\"\\uDBFF\\uDFFF\"]"), D("[[],[],{}]"), D("[[[[[[]]]]]]"),
    D("{\"a\":[{\"b\":[{}]}],\"c\":null}"), D("[\"]\",\"}\",\",\",\":\"]"),
    D("[\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"]"),
};

static const doc refused[] = {
    /* nothing, or not enough */
    D(""), D(" "), D("["), D("{"), D("[["), D("[1"), D("[1,"), D("[\"a\""),
    D("[\"a"), D("\""), D("\"a"), D("{\"a\""), D("{\"a\":"), D("{\"a\":1"),
    D("{\"a\":1,"), D("{\"a"), D("[{"), D("[{}"), D("[1,\n1\n,1"), D("t"),
    D("tru"), D("fals"), D("nul"), D("-"), D("[-"), D("[\"\\"),
    D("[\"\\u"), D("[\"\\u00"), D("[\"\\u000"), D("{\"\\u"),
    /* too much */
    D("]"), D("}"), D("[]]"), D("{}}"), D("[][]"), D("{}{}"), D("1 2"),
    D("[]a"), D("nulll"), D("truefalse"), D("\"a\"\"b\""), D("[],"),
    D(",[]"), D("1]"), D("{},"), D("[1]x"), D("[] []"), D("\"\"x"),
    D("{\"a\":1}#"), D("{\"a\":1}/**/"), D("[1]\0"), D("\0[1]"),
    /* the wrong brackets */
    D("[}"), D("{]"), D("[1}"), D("{\"a\":1]"), D("[[1}]"), D("[{]"),
    D("{\"a\":[}"), D("{[]}"), D("{{}}"), D("([])"), D("<a>"),
    /* commas and colons */
    D("[,]"), D("[1,]"), D("[,1]"), D("[1,,2]"), D("[1 2]"), D("[1:2]"),
    D("{,}"), D("{\"a\":1,}"), D("{,\"a\":1}"), D("{\"a\":1,,\"b\":2}"),
    D("{\"a\" 1}"), D("{\"a\",1}"), D("{\"a\"}"), D("{:1}"), D("{\"a\"::1}"),
    D("{\"a\":}"), D("{\"a\":1 \"b\":2}"), D("[\"a\" \"b\"]"), D("[:]"),
    D("{\"a\":1:2}"), D("[1;2]"), D("{\"a\":[],[]}"), D("[\"\",]"),
    D("{\"a\":\"b\",}"), D("[[],]"), D("{\"a\":{},}"),
    /* keys */
    D("{a:1}"), D("{1:1}"), D("{null:1}"), D("{'a':1}"), D("{[]:1}"),
    D("{\"a\":1,b:2}"), D("{\"a\":1,2}"), D("{true:1}"), D("{\"\\x\":1}"),
    D("{\"a\n\":1}"),
    /* numbers */
    D("[+1]"), D("[01]"), D("[-01]"), D("[00]"), D("[1.]"), D("[.5]"),
    D("[-.5]"), D("[1.e1]"), D("[1e]"), D("[1e+]"), D("[1e-]"), D("[1.2.3]"),
    D("[1e1.5]"), D("[1e1e1]"), D("[--1]"), D("[-]"), D("[-a]"), D("[0x1]"),
    D("[1a]"), D("[1_000]"), D("[1,000.5.]"), D("[NaN]"), D("[Infinity]"),
    D("[-Infinity]"), D("[Inf]"), D("[nan]"), D("[1 .5]"), D("[- 1]"),
    D("[0e]"), D("[0.e1]"), D("[012]"), D("[-012]"), D("[1+2]"), D("[1eE2]"),
    D("[\xEF\xBC\x91]"), D("[1/2]"), D("[$1]"), D("[0.3e]"), D("[9.e+]"),
    D("[-2.]"), D("[2.e-3]"), D("[0.1.2]"), D("[.-1]"), D("[1\xE5]"),
    /* words */
    D("[True]"), D("[TRUE]"), D("[nul]"), D("[nulL]"), D("[tru]"),
    D("[falsy]"), D("[undefined]"), D("[a]"), D("[truee]"), D("abc"),
    D("[nullnull]"), D("*"), D("[*]"), D("\xC3\xA9"), D("[\xFF]"),
    /* strings */
    D("['a']"), D("[\"a\n\"]"), D("[\"a\r\"]"), D("[\"a\t\"]"),
    D("[\"a\x1F\"]"), D("[\"a\0b\"]"), D("[\"\\x41\"]"), D("[\"\\a\"]"),
    D("[\"\\'\"]"), D("[\"\\0\"]"), D("[\"\\v\"]"), D("[\"\\e\"]"),
    D("[\"\\U0041\"]"), D("[\"\\B\"]"), D("[\"\\u00g0\"]"),
    D("[\"\\u 123\"]"), D("[\"\\u+123\"]"), D("[\"\\u-123\"]"),
    D("[\"\\u123\"]"), D("[\"\\u12\"]"), D("[\"\\u\"]"), D("[\"\\\"]"),
    D("[\"\\\n\"]"), D("[\"\\\0\"]"), D("[\"\\\xC3\xA9\"]"), D("[\\n]"),
    D("[\"\\u00`0\"]"), D("[\"\\u00@0\"]"), D("[\"\\uD834\\u\"]"),
    D("[\"aaaaaaaa\naaaaaaaa\"]"), D("[a\"]"), D("[\"\"\"]"), D("[\\u0061]"),
    /* white space and comments that JSON has not */
    D("\v[]"), D("[\f]"), D("\xC2\xA0[]"), D("\xE2\x80\x80[]"), D("[\x1F]"),
    D("//\n[]"), D("/**/[]"), D("[]//"), D("[/**/]"), D("#\n[]"),
    D("[1,\v2]"), D("{\"a\":/**/1}"), D("[\0]"), D("[1\0]"),
};

/* What RFC 8259 leaves free, as it is here: bytes that are no UTF-8 and lone
 * surrogates are let through and replaced when the string is decoded; a BOM
 * is refused, the framer takes it away. */
static const struct {
    doc d;
    bool ok;
} pinned[] = {
    { D("[\"\xFF\"]"), true },
    { D("[\"\xC3\"]"), true },
    { D("[\"\xC3(\"]"), true },
    { D("[\"\xC0\xAF\"]"), true },
    { D("[\"\xE0\x80\xAF\"]"), true },
    { D("[\"\xED\xA0\x80\"]"), true },
    { D("[\"\xF4\x90\x80\x80\"]"), true },
    { D("[\"\xF8\x88\x80\x80\x80\"]"), true },
    { D("[\"\x80\"]"), true },
    { D("[\"\\uD800\"]"), true },
    { D("[\"\\uDC00\"]"), true },
    { D("[\"\\uDE00\\uD83D\"]"), true },
    { D("[\"\\uD83D\\uD83D\\uDE00\"]"), true },
    { D("[\"\\uD83Dx\"]"), true },
    { D("[\"\\uD83D\\n\"]"), true },
    { D("[\"\\uFFFE\\uFFFF\"]"), true },
    { D("{\"\xFF\":1}"), true },
    { D("{\"\\uD800\":1}"), true },
    { D("[1.7976931348623157e309]"), true },
    { D("[123123e100000]"), true },
    { D("[-123123123123123123123123123123]"), true },
    { D("[0.4e00669999999999999999999999999999999999999999999]"), true },
    { D("\xEF\xBB\xBF[]"), false },
    { D("\xEF\xBB\xBF"), false },
    { D("[\0\"\0a\0\"\0]\0"), false }, /* UTF-16 */
};

/* Reads to the end; whether the document is accepted. */
static bool reads(const char *s, size_t n)
{
    llmcbi_json j;
    llmcbi_json_type type;
    size_t steps = 0;

    llmcbi_json_init(&j, s, n);
    do {
        type = llmcbi_json_next(&j);
        if (++steps > n + 2) abort(); /* it does not end */
    } while (type != LLMCBI_JSON_END && type != LLMCBI_JSON_ERROR);
    for (int i = 0; i < 3; i++)
        if (llmcbi_json_next(&j) != type) TEST_FAIL("the end does not last");
    return type == LLMCBI_JSON_END;
}

/* The same at both guard pages, and through the other ways of reading. */
static bool accepts(const char *s, size_t n)
{
    bool ok = reads(guarded(s, n, true), n);
    llmcbi_json j;

    CHECK_INT(reads(guarded(s, n, false), n), ok);
    llmcbi_json_init(&j, guarded(s, n, true), n);
    if ((llmcbi_json_raw(&j) != LLMCBI_JSON_ERROR &&
         llmcbi_json_whole(&j)) != ok)
        TEST_FAIL("json_raw differs");
    llmcbi_json_init(&j, guarded(s, n, true), n);
    llmcbi_json_skip(&j, llmcbi_json_next(&j));
    if (llmcbi_json_whole(&j) != ok) TEST_FAIL("json_skip differs");
    return ok;
}

TEST(documents_are_accepted_or_refused)
{
    size_t i;

    for (i = 0; i < sizeof accepted / sizeof *accepted; i++)
        if (!accepts(accepted[i].text, accepted[i].len))
            TEST_FAIL("refused: %s", accepted[i].text);
    for (i = 0; i < sizeof refused / sizeof *refused; i++)
        if (accepts(refused[i].text, refused[i].len))
            TEST_FAIL("accepted: %s", refused[i].text);
    for (i = 0; i < sizeof pinned / sizeof *pinned; i++)
        if (accepts(pinned[i].d.text, pinned[i].d.len) != pinned[i].ok)
            TEST_FAIL("pinned: %s", pinned[i].d.text);
}

TEST(no_part_of_a_document_is_one)
{
    for (size_t i = 0; i < sizeof accepted / sizeof *accepted; i++) {
        const doc *d = &accepted[i];
        if (*d->text != '[' && *d->text != '{') continue;
        for (size_t n = 0; n < d->len; n++)
            if (accepts(d->text, n))
                TEST_FAIL("accepted: %.*s", (int)n, d->text);
    }
}

/* ---- a second reader -----------------------------------------------------*/

/* Written from the grammar, recursive; NULL: refused. */
static const char *second_value(const char *p, const char *end, int depth);

static const char *blank(const char *p, const char *end)
{
    while (p < end && strchr(" \t\r\n", *p) && *p) p++;
    return p;
}

static const char *second_string(const char *p, const char *end)
{
    if (p == end || *p++ != '"') return NULL;
    for (; p < end && *p != '"'; p++) {
        if ((unsigned char)*p < ' ') return NULL;
        if (*p != '\\') continue;
        if (++p == end || !*p || !strchr("\"\\/bfnrtu", *p)) return NULL;
        for (int i = *p == 'u' ? 4 : 0; i > 0; i--)
            if (++p == end || !*p || !strchr("0123456789abcdefABCDEF", *p))
                return NULL;
    }
    return p < end ? p + 1 : NULL;
}

static const char *some_digits(const char *p, const char *end)
{
    if (p == end || *p < '0' || *p > '9') return NULL;
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p;
}

static const char *second_number(const char *p, const char *end)
{
    if (p < end && *p == '-') p++;
    p = p < end && *p == '0' ? p + 1 : some_digits(p, end);
    if (p && p < end && *p == '.') p = some_digits(p + 1, end);
    if (p && p < end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < end && (*p == '+' || *p == '-')) p++;
        p = some_digits(p, end);
    }
    return p;
}

static const char *second_container(const char *p, const char *end, int depth)
{
    bool object = *p == '{';
    char close = object ? '}' : ']';

    if (depth == 128) return NULL;
    p = blank(p + 1, end);
    if (p < end && *p == close) return p + 1;
    for (;; p++) {
        if (object) {
            p = second_string(blank(p, end), end);
            if (!p) return NULL;
            p = blank(p, end);
            if (p == end || *p++ != ':') return NULL;
        }
        p = second_value(p, end, depth + 1);
        if (!p || p == end) return NULL;
        if (*p == close) return p + 1;
        if (*p != ',') return NULL;
    }
}

static const char *second_value(const char *p, const char *end, int depth)
{
    static const char *const words[] = { "true", "false", "null" };

    p = blank(p, end);
    if (p == end) return NULL;
    if (*p == '{' || *p == '[') {
        p = second_container(p, end, depth);
    } else if (*p == '"') {
        p = second_string(p, end);
    } else if (*p >= 'a') {
        const char *at = p;
        p = NULL;
        for (int i = 0; i < 3; i++) {
            size_t n = strlen(words[i]);
            if ((size_t)(end - at) >= n && memcmp(at, words[i], n) == 0)
                p = at + n;
        }
    } else {
        p = second_number(p, end);
    }
    return p ? blank(p, end) : NULL;
}

static uint64_t seed; /* of random tests; SEED in the environment sets it */

static llmcbi_random seeded(void)
{
    llmcbi_random r = { { 1, 2, 3, 4 } };
    const char *s = getenv("SEED");

    seed = s ? strtoull(s, NULL, 10) : (uint64_t)time(NULL);
    r.s[0] = seed;
    for (int i = 0; i < 20; i++) llmcbi_random_next(&r);
    return r;
}

TEST(damaged_documents_are_judged_as_by_a_second_reader)
{
    static const char bits[] = "[]{}\",:\\0123456789-+.eEutrfalsn \n\t\x80\xC3";
    llmcbi_random r = seeded();
    size_t n_docs = sizeof accepted / sizeof *accepted, ok = 0;

    for (int i = 0; i < 60000; i++) {
        const doc *d = &accepted[llmcbi_random_next(&r) % n_docs];
        char s[128];
        size_t n = d->len, k = llmcbi_random_next(&r) % 4;
        memcpy(s, d->text, n);
        for (; k-- > 0 && n;) {
            size_t at = llmcbi_random_next(&r) % n;
            char c = bits[llmcbi_random_next(&r) % (sizeof bits - 1)];
            switch (llmcbi_random_next(&r) % 3) {
            case 0: s[at] = c; break;
            case 1: memmove(s + at, s + at + 1, --n - at); break;
            default:
                memmove(s + at + 1, s + at, n++ - at);
                s[at] = c;
            }
        }
        if (reads(guarded(s, n, true), n) !=
            (second_value(s, s + n, 0) == s + n))
            TEST_FAIL("seed %llu: %.*s", (unsigned long long)seed, (int)n, s);
        ok += reads(s, n);
    }
    CHECK(ok > 10000 && ok < 50000); /* both verdicts are exercised */
}

/* ---- what is read --------------------------------------------------------*/

TEST(tokens_come_in_order_with_their_text)
{
    static const char s[] = " {\"a\" : [1, -2.5e3,\"x\\n\",true], \"\": {},"
                            "\"\xC3\xA9\":[false,null]} ";
    static const struct {
        llmcbi_json_type type;
        const char *str;
        bool escaped, high;
    } want[] = { { LLMCBI_JSON_OBJECT, NULL, false, false },
                 { LLMCBI_JSON_KEY, "a", false, false },
                 { LLMCBI_JSON_ARRAY, NULL, false, false },
                 { LLMCBI_JSON_NUMBER, "1", false, false },
                 { LLMCBI_JSON_NUMBER, "-2.5e3", false, false },
                 { LLMCBI_JSON_STRING, "x\\n", true, false },
                 { LLMCBI_JSON_TRUE, NULL, false, false },
                 { LLMCBI_JSON_ARRAY_END, NULL, false, false },
                 { LLMCBI_JSON_KEY, "", false, false },
                 { LLMCBI_JSON_OBJECT, NULL, false, false },
                 { LLMCBI_JSON_OBJECT_END, NULL, false, false },
                 { LLMCBI_JSON_KEY, "\xC3\xA9", false, true },
                 { LLMCBI_JSON_ARRAY, NULL, false, false },
                 { LLMCBI_JSON_FALSE, NULL, false, false },
                 { LLMCBI_JSON_NULL, NULL, false, false },
                 { LLMCBI_JSON_ARRAY_END, NULL, false, false },
                 { LLMCBI_JSON_OBJECT_END, NULL, false, false },
                 { LLMCBI_JSON_END, NULL, false, false } };
    llmcbi_json j;

    llmcbi_json_init(&j, guarded(s, sizeof s - 1, true), sizeof s - 1);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        CHECK_INT(llmcbi_json_next(&j), want[i].type);
        if (!want[i].str) continue;
        CHECK(llmcbi_str_is(llmcbi_slice(j.str, j.len), want[i].str));
        if (want[i].type == LLMCBI_JSON_NUMBER) continue;
        CHECK(j.escaped == want[i].escaped && j.high == want[i].high);
    }
}

/* The reader looks at eight bytes at a time where it can. */
TEST(each_byte_counts_at_each_place_of_a_string)
{
    for (size_t before = 0; before < 20; before++)
        for (size_t after = 0; after < 20; after++)
            for (int c = 1; c < 256; c++) {
                char s[48];
                size_t n = before + 1 + after + 2;
                llmcbi_json j;
                llmcbi_json_type type;
                if (c > 0x23 && c < 0x7E && c != '\\') continue;
                memset(s, 'a', sizeof s);
                s[0] = s[n - 1] = '"';
                s[1 + before] = (char)c;
                llmcbi_json_init(&j, guarded(s, n, true), n);
                type = llmcbi_json_next(&j);
                if (type != (c < 0x20 || c == '\\' ? LLMCBI_JSON_ERROR
                                                   : LLMCBI_JSON_STRING))
                    TEST_FAIL("byte %02X at %d", (unsigned)c, (int)before);
                else if (type == LLMCBI_JSON_STRING &&
                         (j.len != (c == '"' ? before : n - 2) ||
                          j.high != (c >= 0x80) || j.escaped))
                    TEST_FAIL("byte %02X: wrong string", (unsigned)c);
            }
}

TEST(depth_128_is_read_and_129_is_not)
{
    for (int kind = 0; kind < 3; kind++) /* arrays, objects, in turns */
        for (int depth = 127; depth <= 129; depth++) {
            char s[1200], *p = s;
            llmcbi_json j;
            llmcbi_json_type type;
            for (int i = 0; i < depth; i++)
                p += sprintf(p, kind == 0 || (kind == 2 && i % 3) ? "["
                                                                  : "{\"a\":");
            *p++ = '1';
            for (int i = depth; i-- > 0;)
                *p++ = kind == 0 || (kind == 2 && i % 3) ? ']' : '}';
            CHECK_INT(accepts(s, (size_t)(p - s)), depth <= 128);
            llmcbi_json_init(&j, s, (size_t)(p - s));
            do type = llmcbi_json_next(&j);
            while (type != LLMCBI_JSON_END && type != LLMCBI_JSON_ERROR);
            CHECK_INT(j.too_deep, depth > 128);
            for (int i = 0; i < depth && depth <= 128; i++) {
                char *close = p - 1 - i; /* one bracket of the wrong kind */
                *close ^= '}' ^ ']';
                CHECK(!accepts(s, (size_t)(p - s)));
                *close ^= '}' ^ ']';
            }
        }
}

/* Only so many bytes are there, and the eight that strings may be looked at
 * in advance: reading on would be a trap. */
TEST(ten_megabytes_of_brackets_are_refused_after_129)
{
    static const char *const units[] = { "[", "{\"a\":" };

    for (int u = 0; u < 2; u++) {
        char s[1024], *p = s;
        const char *at;
        llmcbi_json j;
        int steps = 1;
        for (int i = 0; i < 128; i++) p += sprintf(p, "%s", units[u]);
        *p++ = *units[u];
        p += sprintf(p, "xxxxxxxx");
        at = guarded(s, (size_t)(p - s), true);
        llmcbi_json_init(&j, at, (size_t)10 << 20);
        while (llmcbi_json_next(&j) != LLMCBI_JSON_ERROR) steps++;
        CHECK_INT(steps, u ? 257 : 129);
        CHECK(j.too_deep);
        llmcbi_json_init(&j, at, (size_t)10 << 20);
        CHECK_INT(llmcbi_json_raw(&j), LLMCBI_JSON_ERROR);
    }
}

TEST(numbers_are_whole_and_fit_or_are_none)
{
    static const struct {
        const char *text;
        bool ok;
        int64_t v;
    } rows[] = {
        { "0", true, 0 },
        { "-0", true, 0 },
        { "42", true, 42 },
        { "-1", true, -1 },
        { "4294967295", true, 4294967295 },
        { "4294967296", true, 4294967296 },
        { "922337203685477580", true, 922337203685477580 },
        { "9223372036854775807", true, INT64_MAX },
        { "-9223372036854775808", true, INT64_MIN },
        { "9223372036854775807.0", true, INT64_MAX },
        { "9223372036854775808", false, 0 },
        { "-9223372036854775809", false, 0 },
        { "18446744073709551616", false, 0 },
        { "99999999999999999999", false, 0 },
        { "12345678901234567890123456789012345678901", false, 0 },
        { "1e999", false, 0 },
        { "1e2", false, 0 },
        { "1E2", false, 0 },
        { "1.5", false, 0 },
        { "1.01", false, 0 },
        { "1.0e2", false, 0 },
        { "1.0", true, 1 },
        { "-12.000", true, -12 },
        { "-0.0", true, 0 },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t n = strlen(rows[i].text);
        llmcbi_json j;
        int64_t v = 77;
        llmcbi_json_init(&j, guarded(rows[i].text, n, true), n);
        CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_NUMBER);
        if (llmcbi_json_int(&j, &v) != rows[i].ok ||
            (rows[i].ok && v != rows[i].v))
            TEST_FAIL("%s", rows[i].text);
    }
}

/* ---- strings -------------------------------------------------------------*/

#define FFFD "\xEF\xBF\xBD"

static const struct {
    const char *raw;
    doc want;
} strings[] = {
    { "", D("") },
    { "plain", D("plain") },
    { "\\\"\\\\\\/\\b\\f\\n\\r\\t", D("\"\\/\b\f\n\r\t") },
    { "http:\\/\\/a\\/b", D("http://a/b") },
    { "a\\u0000b", D("a\0b") },
    { "\\u0041\\u00e9\\u20AC\\uffff", D("A\xC3\xA9\xE2\x82\xAC\xEF\xBF\xBF") },
    { "\\u007f\\u0080\\u07ff\\u0800", D("\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80") },
    { "\\ud83d\\ude00", D("\xF0\x9F\x98\x80") },
    { "\\uD800\\uDC00\\uDBFF\\uDFFF", D("\xF0\x90\x80\x80\xF4\x8F\xBF\xBF") },
    { "\\ud83d", D(FFFD) },
    { "\\ud83dx", D(FFFD "x") },
    { "\\ud83d\\n", D(FFFD "\n") },
    { "\\ud83d\\u0041", D(FFFD "A") },
    { "\\ud83d\\ud83d\\ude00", D(FFFD "\xF0\x9F\x98\x80") },
    { "\\ud83d\\ud83d", D(FFFD FFFD) },
    { "\\ud83d\\udbff\\udfff", D(FFFD "\xF4\x8F\xBF\xBF") },
    { "\\ud83d\\ue000\\ud83d\\uffff", D(FFFD "\xEE\x80\x80" FFFD
                                         "\xEF\xBF\xBF") },
    { "\\ude00", D(FFFD) },
    { "\\ude00\\ud83d", D(FFFD FFFD) },
    { "\\udc00\\udc00", D(FFFD FFFD) },
    { "\\ude00\\ude00x", D(FFFD FFFD "x") },
    { "\\ud7ff\\ue000", D("\xED\x9F\xBF\xEE\x80\x80") },
    { "\\ud83d\xC3\xA9", D(FFFD "\xC3\xA9") },
    { "\\ud83d\xF0\x9F\x98\x80", D(FFFD "\xF0\x9F\x98\x80") },
    { "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", D("\xC3\xA9\xE2\x82\xAC"
                                               "\xF0\x9F\x98\x80") },
    { "\xC3\\n", D(FFFD "\n") },
    { "\xF0\x9F\x98\\ud83d", D(FFFD FFFD) },
    { "\xE2\x82\\u00e9", D(FFFD "\xC3\xA9") },
    { "\xFF\xFE", D(FFFD FFFD) },
    { "\xC0\xAF", D(FFFD FFFD) },
    { "\xE0\x80\xAF", D(FFFD FFFD FFFD) },
    { "\xED\xA0\x80", D(FFFD FFFD FFFD) },
    { "\xF4\x90\x80\x80", D(FFFD FFFD FFFD FFFD) },
    { "\xF0\x9F\x98", D(FFFD) },
    { "\xF0\x9F\x98x", D(FFFD "x") },
    { "\x80", D(FFFD) },
};

/* Decodes pieces [0, a), [a, b), [b, n), each within its bound. */
static size_t decode3(char *out, const char *s, const size_t cut[4])
{
    llmcbi_carry c;
    char *o = out;

    memset(&c, 0, sizeof c);
    for (int i = 0; i < 3; i++) {
        size_t len = cut[i + 1] - cut[i];
        size_t n = llmcbi_json_decode(o, guarded(s + cut[i], len, true), len,
                                      &c);
        CHECK(n <= 3 * len + 6);
        o += n;
    }
    return (size_t)(llmcbi_carry_flush(o, &c) - out);
}

/* Where a string may end: not within an escape. */
static bool may_cut(const char *s, size_t at)
{
    size_t i = 0;

    while (i < at) i += s[i] != '\\' ? 1 : s[i + 1] == 'u' ? 6 : 2;
    return i == at;
}

TEST(strings_are_decoded_the_same_in_any_pieces)
{
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        const char *s = strings[i].raw;
        const doc *want = &strings[i].want;
        size_t n = strlen(s), cut[4] = { 0, 0, 0, n };
        for (cut[1] = 0; cut[1] <= n; cut[1]++)
            for (cut[2] = cut[1]; cut[2] <= n; cut[2]++) {
                char out[256];
                size_t got;
                if (!may_cut(s, cut[1]) || !may_cut(s, cut[2])) continue;
                got = decode3(out, s, cut);
                if (got != want->len || memcmp(out, want->text, got) != 0)
                    TEST_FAIL("%s cut at %d, %d", s, (int)cut[1],
                              (int)cut[2]);
            }
    }
}

static llmcb_allocator plain_allocator(void)
{
    llmcb_allocator a = { llmcbi_default_resize, NULL };

    return a;
}

TEST(a_whole_string_is_appended_and_compared)
{
    llmcb_allocator a = plain_allocator();

    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        const doc *want = &strings[i].want;
        char s[128];
        int n = sprintf(s, "{\"%s\":\"%s\"}", strings[i].raw, strings[i].raw);
        llmcbi_json j;
        llmcbi_buf b;
        memset(&b, 0, sizeof b);
        llmcbi_json_init(&j, guarded(s, (size_t)n, true), (size_t)n);
        llmcbi_json_next(&j);
        CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_KEY);
        /* a key that is no clean text is no name that we know */
        if (strlen(want->text) == want->len && !strstr(want->text, FFFD)) {
            CHECK(llmcbi_json_is_text(&j, llmcb_text(want->text)));
            CHECK(!llmcbi_json_is(&j, "other"));
        }
        CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_STRING);
        llmcbi_buf_text(&a, &b, ">");
        llmcbi_json_text(&a, &b, &j);
        CHECK(b.len == want->len + 1 && b.ptr[b.len] == '\0');
        CHECK(memcmp(b.ptr + 1, want->text, want->len) == 0);
        llmcbi_buf_free(&a, &b);
    }
}

/* Each byte of it becomes three. */
TEST(the_longest_text_has_room)
{
    for (size_t n = 0; n < 200; n++) {
        llmcb_allocator a = plain_allocator();
        char s[200];
        llmcbi_json j;
        llmcbi_buf b;
        memset(s, 0xFF, sizeof s);
        memset(&j, 0, sizeof j);
        memset(&b, 0, sizeof b);
        j.str = guarded(s, n, true);
        j.len = n;
        llmcbi_json_text(&a, &b, &j);
        CHECK(b.len == 3 * n && b.cap > b.len);
        llmcbi_buf_free(&a, &b);
    }
}

TEST(keys_are_known_in_any_spelling)
{
    static const struct {
        const char *key;
        bool is; /* "content" */
    } rows[] = { { "content", true },
                 { "\\u0063ontent", true },
                 { "conten\\u0074", true },
                 { "\\u0063\\u006F\\u006E\\u0074ent", true },
                 { "conten", false },
                 { "contents", false },
                 { "Content", false },
                 { "content\\u0000", false },
                 { "\\u0000content", false },
                 { "content\\ud83d", false },
                 { "\\ncontent", false },
                 /* longer than any name, however spelt */
                 { "\\u0063\\u006F\\u006E\\u0074\\u0065\\u006E\\u0074x",
                   false },
                 { "", false } };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char s[128];
        int n = sprintf(s, "{\"%s\":0", rows[i].key);
        llmcbi_json j;
        llmcbi_json_init(&j, guarded(s, (size_t)n, true), (size_t)n);
        llmcbi_json_next(&j);
        llmcbi_json_next(&j);
        if (llmcbi_json_is(&j, "content") != rows[i].is)
            TEST_FAIL("%s", rows[i].key);
    }
}

TEST(raw_values_are_shown_with_their_text)
{
    static const struct {
        const char *value;
        llmcbi_json_type type;
    } rows[] = { { "{\"a\":[1,{\"b\":\"}\"}]}", LLMCBI_JSON_OBJECT },
                 { "[[],{},\"]\"]", LLMCBI_JSON_ARRAY },
                 { "{}", LLMCBI_JSON_OBJECT },
                 { "\"x\\\"y\"", LLMCBI_JSON_STRING },
                 { "-1.5e3", LLMCBI_JSON_NUMBER },
                 { "null", LLMCBI_JSON_NULL },
                 { "[1,}", LLMCBI_JSON_ERROR },
                 { "{\"a\":1", LLMCBI_JSON_ERROR },
                 { "[", LLMCBI_JSON_ERROR } };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char s[64];
        int n = sprintf(s, "[ %s , 7]", rows[i].value);
        llmcbi_json j;
        llmcbi_json_init(&j, guarded(s, (size_t)n, true), (size_t)n);
        llmcbi_json_next(&j);
        CHECK_INT(llmcbi_json_raw(&j), rows[i].type);
        if (rows[i].type == LLMCBI_JSON_ERROR) {
            CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_ERROR);
            continue;
        }
        CHECK(llmcbi_str_is(llmcbi_slice(j.str, j.len), rows[i].value));
        CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_NUMBER);
        CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_ARRAY_END);
        CHECK(llmcbi_json_whole(&j));
    }
}

/* ---- the writer ----------------------------------------------------------*/

static void quote(const llmcb_allocator *a, llmcbi_buf *b, const char *s,
                  size_t n)
{
    llmcb_str text = { s, n };

    llmcbi_buf_print(a, b, "\"%J\"", &text);
}

/* Quotes s and reads it back: the same, with nothing raw in between. */
static void round_trip(llmcbi_buf *b, llmcbi_buf *back, const char *s,
                       size_t n)
{
    llmcb_allocator a = plain_allocator();
    llmcbi_json j;

    b->len = back->len = 0;
    quote(&a, b, s, n);
    for (size_t i = 0; i < b->len; i++)
        if ((unsigned char)b->ptr[i] < 0x20 || b->ptr[i] == 0x7F)
            TEST_FAIL("a raw control character");
    llmcbi_json_init(&j, b->ptr, b->len);
    CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_STRING);
    llmcbi_json_text(&a, back, &j);
    CHECK(llmcbi_json_whole(&j));
    if (back->len != n || (n && memcmp(back->ptr, s, n) != 0))
        TEST_FAIL("seed %llu: differs", (unsigned long long)seed);
}

TEST(what_is_quoted_reads_back_as_it_was)
{
    llmcb_allocator a = plain_allocator();
    llmcbi_random r = seeded();
    llmcbi_buf b, back;
    char s[600], *p = s;

    memset(&b, 0, sizeof b);
    memset(&back, 0, sizeof back);
    for (uint32_t cp = 0; cp < 0x110000; cp++) { /* all there are */
        if (cp < 0xD800 || cp > 0xDFFF) p = llmcbi_put_utf8(p, cp);
        if (p - s < 500 && cp != 0x10FFFF) continue;
        round_trip(&b, &back, s, (size_t)(p - s));
        p = s;
    }
    for (int i = 0; i < 5000; i++) {
        size_t n = llmcbi_random_next(&r) % 40;
        for (p = s; n-- > 0;) {
            uint64_t x = llmcbi_random_next(&r);
            uint32_t cp = (uint32_t)(x >> 8) %
                          (x & 1 ? 0x30u : x & 2 ? 0x80u : 0xD800u);
            p = llmcbi_put_utf8(p, cp);
        }
        round_trip(&b, &back, s, (size_t)(p - s));
    }
    llmcbi_buf_free(&a, &b);
    llmcbi_buf_free(&a, &back);
}

TEST(quoting_uses_the_short_escapes)
{
    static const char in[] = "\"\\\n\r\t\b\f/\x01\x1F\x7F'\0\xC3\xA9";
    llmcb_allocator a = plain_allocator();
    llmcbi_buf b;

    memset(&b, 0, sizeof b);
    quote(&a, &b, in, sizeof in - 1);
    CHECK_STR(b.ptr, "\"\\\"\\\\\\n\\r\\t\\b\\f/\\u0001\\u001f\\u007f'\\u0000"
                     "\xC3\xA9\"");
    llmcbi_buf_free(&a, &b);
}

/* ---- the cut for error texts ---------------------------------------------*/

TEST(a_cut_string_ends_before_an_escape_and_is_clean)
{
    static const char *const marks[] = { "\\n", "\\\\", "\\u00e9", "\\\"",
                                         "\\\\\\\\\\\\", "\\ud83d\\ude00",
                                         "\xF0\x9F\x98\x80", "\\\\\\u0041" };
    static const size_t caps[] = { 1, 2, 48, 256 };

    for (size_t m = 0; m < sizeof marks / sizeof *marks; m++)
        for (size_t at = 236; at < 260; at++)
            for (size_t len = at + strlen(marks[m]); len < 272; len++)
                for (size_t c = 0; c < 4; c++) {
                    char s[300], whole[900], clean[900], out[300];
                    llmcbi_json j;
                    llmcbi_carry carry;
                    size_t n, size;
                    memset(s, 'a', sizeof s);
                    memcpy(s + at, marks[m], strlen(marks[m]));
                    memset(&j, 0, sizeof j);
                    memset(&carry, 0, sizeof carry);
                    n = llmcbi_json_decode(whole, s, len, &carry);
                    llmcbi_copy_clean(clean, sizeof clean, whole, n);
                    j.str = guarded(s, len, true);
                    j.len = len;
                    memset(out, 'x', sizeof out);
                    llmcbi_json_clean(out, caps[c], j.str, j.len);
                    size = strlen(out);
                    CHECK(size < caps[c]);
                    if (strncmp(out, clean, size) != 0)
                        TEST_FAIL("%s at %d of %d", marks[m], (int)at,
                                  (int)len);
                    /* and no more is lost than has to be */
                    if (size + 20 < caps[c] && size + 24 < n)
                        TEST_FAIL("only %d of %d", (int)size, (int)n);
                }
}

/* The id of a zeroed llmcb_tool_call. Last: UBSan ends the program if the
 * pointer is added to. */
TEST(a_string_that_is_null_is_quoted_as_empty)
{
    llmcb_allocator a = plain_allocator();
    llmcbi_buf b;

    memset(&b, 0, sizeof b);
    quote(&a, &b, NULL, 0);
    CHECK_STR(b.ptr, "\"\"");
    llmcbi_buf_free(&a, &b);
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}
