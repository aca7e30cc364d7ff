/* [BASE]: buffers, arena, errors, ids, UTF-8. White-box: the functions are
 * called as the other sections call them. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_KIT -DLLMCB_NO_SOCKETS */
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#include "../llmcb.h"
#include "test.h"

/* An allocator that fails at one call, or from it on, fills what it gives
 * with rubbish and checks the sizes that it is told. */
typedef struct heap {
    size_t calls, fail_at, live;
    bool for_ever, wrong;
} heap;

static void *heap_resize(void *user, void *ptr, size_t old, size_t size)
{
    heap *h = user;
    char *p = ptr ? (char *)ptr - 16 : NULL;
    size_t was = 0;

    if (p) memcpy(&was, p, sizeof was);
    h->wrong |= old != was;
    if (size) {
        h->calls++;
        if (h->calls == h->fail_at ||
            (h->for_ever && h->fail_at && h->calls > h->fail_at))
            return NULL;
    }
    h->live += size - was;
    if (!size) {
        free(p);
        return NULL;
    }
    p = realloc(p, 16 + size);
    if (size > was) memset(p + 16 + was, 0xA5, size - was);
    memcpy(p, &size, sizeof size);
    return p + 16;
}

static llmcb_allocator heap_allocator(heap *h, size_t fail_at, bool for_ever)
{
    llmcb_allocator a;

    memset(h, 0, sizeof *h);
    h->fail_at = fail_at;
    h->for_ever = for_ever;
    a.resize = heap_resize;
    a.user = h;
    return a;
}

static void check_heap(const heap *h)
{
    CHECK(!h->wrong);
    CHECK_INT(h->live, 0);
}

/* ---- codes ---------------------------------------------------------------*/

TEST(every_code_has_its_name_and_a_text)
{
#define ROW(code) { code, #code }
    static const struct {
        llmcb_code code;
        const char *name;
    } rows[] = { ROW(LLMCB_OK),        ROW(LLMCB_ENOMEM),
                 ROW(LLMCB_EINVAL),    ROW(LLMCB_ESTATE),
                 ROW(LLMCB_ECANCELLED), ROW(LLMCB_ETIMEDOUT),
                 ROW(LLMCB_EDNS),      ROW(LLMCB_ECONNECT),
                 ROW(LLMCB_ETLS),      ROW(LLMCB_EIO),
                 ROW(LLMCB_ETRUNCATED), ROW(LLMCB_EHTTP),
                 ROW(LLMCB_EAPI),      ROW(LLMCB_EPROTO),
                 ROW(LLMCB_ECTYPE),    ROW(LLMCB_EREDIRECT),
                 ROW(LLMCB_EJSON),     ROW(LLMCB_EUTF8),
                 ROW(LLMCB_ELIMIT),    ROW(LLMCB_EHANDLER),
                 ROW(LLMCB_EBUSY),     ROW(LLMCB_ESYS),
                 ROW(LLMCB_EFORK),     ROW(LLMCB_ETOOL) };
#undef ROW

    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++) {
        const llmcb_error *e = llmcbi_error_const(rows[i].code);
        CHECK_INT(rows[i].code, -i); /* the numbers are stable */
        CHECK_STR(llmcb_code_name(rows[i].code), rows[i].name);
        CHECK_INT(e->code, rows[i].code);
        CHECK_STR(e->message, llmcb_code_text(rows[i].code));
        CHECK_INT(e->retry_after_ms, -1);
        CHECK(!e->detail && !e->http_status && !e->sys_errno && !e->attempt &&
              !*e->type && !*e->provider_code && !*e->request_id &&
              !e->handler_result);
        for (int k = 0; k < i; k++)
            CHECK(strcmp(e->message, llmcb_code_text(rows[k].code)) != 0);
    }
    for (int code = -24; code < 2; code += 25) {
        CHECK_STR(llmcb_code_name((llmcb_code)code), "LLMCB_UNKNOWN");
        CHECK_STR(llmcb_code_text((llmcb_code)code), "unknown error");
    }
    CHECK_STR(llmcb_version(), LLMCB_VERSION);
}

/* ---- strings -------------------------------------------------------------*/

TEST(strings_are_compared_with_their_length)
{
    static const struct {
        const char *s;
        size_t len;
        char other[16]; /* so that reading on behind its NUL is no crash */
        bool equal, nocase;
    } rows[] = {
        { "", 0, "", true, true },
        { "a", 1, "", false, false },
        { "", 0, "a", false, false },
        { "abc", 3, "abc", true, true },
        { "ABC", 3, "abc", false, true },
        { "ab", 2, "abc", false, false },
        { "abcd", 4, "abc", false, false },
        { "ab\0", 3, "ab", false, false },
        { "[@`{", 4, "[@`{", true, true }, /* the neighbours of letters */
        { "{", 1, "[", false, false },
        { "close\0x", 7, "close\0x", false, false }, /* NUL ends the other */
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        llmcb_str s = llmcbi_slice(rows[i].s, rows[i].len);
        if (llmcbi_str_is(s, rows[i].other) != rows[i].equal ||
            llmcbi_str_is_nocase(s, rows[i].other) != rows[i].nocase)
            TEST_FAIL("row %d", (int)i);
    }
    CHECK_INT(llmcb_text(NULL).len, 0);
    /* of two lengths, where neither may have bytes */
    CHECK(llmcbi_str_equal(llmcbi_slice(NULL, 0), llmcbi_slice(NULL, 0)));
    CHECK(llmcbi_str_equal(llmcbi_slice("a\0b", 3), llmcbi_slice("a\0b", 3)));
    CHECK(!llmcbi_str_equal(llmcbi_slice("a\0b", 3), llmcbi_slice("a\0c", 3)));
    CHECK(!llmcbi_str_equal(llmcbi_slice("ab", 2), llmcbi_slice("a", 1)));
}

TEST(words_of_a_list_are_whole)
{
    CHECK(llmcbi_str_listed(llmcb_text("a"), "a bc"));
    CHECK(llmcbi_str_listed(llmcb_text("BC"), "a bc"));
    CHECK(!llmcbi_str_listed(llmcb_text("b"), "a bc"));
    CHECK(!llmcbi_str_listed(llmcb_text("bcd"), "a bc"));
    CHECK(!llmcbi_str_listed(llmcb_text(""), "a bc"));
    CHECK(!llmcbi_str_listed(llmcb_text("a"), ""));
}

/* Kinds that there are have names of their own, others have none. */
TEST(every_event_has_its_name)
{
    for (int a = 0; a < LLMCB_N_EVENTS; a++) {
        const char *name = llmcb_event_name((llmcb_event_kind)a);
        CHECK(strncmp(name, "on_", 3) == 0);
        for (int b = 0; b < a; b++)
            CHECK(strcmp(name, llmcb_event_name((llmcb_event_kind)b)) != 0);
    }
    CHECK_STR(llmcb_event_name(LLMCB_N_EVENTS), "");
}

TEST(a_word_is_listed_whole_or_not_at_all)
{
    static const char *const in[] = { "one", "TWO", "three", "Three" };
    static const char *const out[] = { "",    "on",   "onex",    "one two",
                                       "tw",  "wo",   "threes",  "e",
                                       "two three", " ", "thre" };

    for (size_t i = 0; i < sizeof in / sizeof *in; i++)
        if (!llmcbi_str_listed(llmcb_text(in[i]), "one two three"))
            TEST_FAIL("\"%s\" is listed", in[i]);
    for (size_t i = 0; i < sizeof out / sizeof *out; i++)
        if (llmcbi_str_listed(llmcb_text(out[i]), "one two three"))
            TEST_FAIL("\"%s\" is not listed", out[i]);
    CHECK(!llmcbi_str_listed(llmcb_text("one"), ""));
}

TEST(decimal_digits)
{
    static const struct {
        int64_t v;
        const char *want;
    } rows[] = { { 0, "0" },
                 { 7, "7" },
                 { -1, "-1" },
                 { 10, "10" },
                 { 1234567890, "1234567890" },
                 { INT64_MAX, "9223372036854775807" },
                 { INT64_MIN, "-9223372036854775808" } };
    heap h;
    llmcb_allocator a = heap_allocator(&h, 0, false);

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char digits[24];
        llmcbi_buf b;
        memset(&b, 0, sizeof b);
        memset(digits, 'x', sizeof digits);
        CHECK_STR(llmcbi_decimal(digits, rows[i].v), rows[i].want);
        llmcbi_buf_print(&a, &b, "%d", rows[i].v);
        CHECK_STR(b.ptr, rows[i].want);
        llmcbi_buf_free(&a, &b);
    }
    check_heap(&h);
}

/* ---- buffers -------------------------------------------------------------*/

static char pattern(size_t i)
{
    return (char)(i * 31 + i / 251);
}

/* Adds pieces of growing size; how many bytes the buffer should hold. */
static size_t fill(const llmcb_allocator *a, llmcbi_buf *b)
{
    size_t held = 0;

    for (size_t n = 0; n < 300; n = n < 5 ? n + 1 : n + 59) {
        char piece[300];
        for (size_t i = 0; i < n; i++) piece[i] = pattern(held + i);
        llmcbi_buf_add(a, b, piece, n);
        if (!b->failed) held += n;
    }
    return held;
}

static void check_filled(const llmcbi_buf *b, size_t held)
{
    CHECK_INT(b->len, held);
    CHECK_INT(llmcbi_buf_str(b).len, held);
    for (size_t i = 0; i < held; i++)
        if (b->ptr[i] != pattern(i)) TEST_FAIL("byte %d differs", (int)i);
    if (b->ptr) CHECK(b->cap > b->len && b->ptr[b->len] == '\0');
}

TEST(a_buffer_grows_and_a_failure_sticks)
{
    heap h;
    llmcb_allocator a = heap_allocator(&h, 0, false);
    llmcbi_buf b;
    size_t all, calls;

    memset(&b, 0, sizeof b);
    CHECK_STR(llmcbi_buf_str(&b).ptr, "");
    all = fill(&a, &b);
    check_filled(&b, all);
    CHECK(all > 500 && b.cap < 2 * all); /* by half, not more */
    calls = h.calls;
    CHECK(calls <= 8);
    llmcbi_buf_free(&a, &b);
    CHECK(!b.ptr && !b.cap && !b.len && !b.failed);
    check_heap(&h);
    for (size_t i = 1; i <= calls; i++) {
        size_t held;
        a = heap_allocator(&h, i, false); /* fails once */
        held = fill(&a, &b);
        CHECK(b.failed && held < all);
        check_filled(&b, held);
        CHECK_INT(h.calls, i); /* and is not tried again */
        llmcbi_buf_free(&a, &b);
        check_heap(&h);
    }
}

TEST(a_buffer_has_room_for_the_nul_behind_a_full_block)
{
    for (size_t n = 60; n < 260; n++) {
        heap h;
        llmcb_allocator a = heap_allocator(&h, 0, false);
        llmcbi_buf b;
        char s[260];
        memset(&b, 0, sizeof b);
        memset(s, 'x', sizeof s);
        llmcbi_buf_add(&a, &b, s, n);
        CHECK(b.len == n && b.cap > n && strlen(b.ptr) == n);
        llmcbi_buf_free(&a, &b);
        check_heap(&h);
    }
}

TEST(an_empty_buffer_that_was_trimmed_grows_again)
{
    heap h;
    llmcb_allocator a = heap_allocator(&h, 0, false);
    llmcbi_buf b;

    memset(&b, 0, sizeof b);
    llmcbi_buf_add(&a, &b, "x", 1);
    b.len = 0;
    llmcbi_buf_trim(&a, &b);
    CHECK_INT(b.cap, 1);
    llmcbi_buf_add(&a, &b, "again", 5);
    CHECK_STR(b.ptr, "again");
    llmcbi_buf_free(&a, &b);
    check_heap(&h);
}

TEST(a_buffer_refuses_absurd_sizes)
{
    static const size_t sizes[] = { SIZE_MAX, SIZE_MAX - 1, SIZE_MAX / 2,
                                    SIZE_MAX / 4 + 1 };
    heap h;
    llmcb_allocator a = heap_allocator(&h, 0, false);

    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int used = 0; used < 2; used++) {
            llmcbi_buf b;
            memset(&b, 0, sizeof b);
            if (used) llmcbi_buf_text(&a, &b, "some");
            CHECK(!llmcbi_buf_reserve(&a, &b, sizes[i]) && b.failed);
            llmcbi_buf_text(&a, &b, "more");
            CHECK_INT(b.len, used ? 4 : 0);
            llmcbi_buf_free(&a, &b);
        }
    CHECK(!llmcbi_alloc(&a, SIZE_MAX) && !llmcbi_alloc(&a, SIZE_MAX / 2 + 1));
    check_heap(&h);
}

/* ---- arena ---------------------------------------------------------------*/

#define N 120
#define PIECE(i) (1 + (i) * (i) / 16) /* some larger than a block */

TEST(an_arena_gives_zeroed_aligned_memory_of_its_own)
{
    static unsigned char *got[N];
    heap h;
    llmcb_allocator a = heap_allocator(&h, 0, false);
    llmcbi_arena arena;
    size_t calls;

    memset(&arena, 0, sizeof arena);
    for (size_t i = 0; i < N; i++) {
        got[i] = llmcbi_arena_get(&a, &arena, PIECE(i));
        REQUIRE(got[i]);
        CHECK_INT((uintptr_t)got[i] % 16, 0);
        for (size_t k = 0; k < PIECE(i); k++)
            if (got[i][k]) TEST_FAIL("piece %d is not zero", (int)i);
        memset(got[i], (int)i, PIECE(i));
    }
    for (size_t i = 0; i < N; i++)
        for (size_t k = 0; k < PIECE(i); k++)
            if (got[i][k] != i) TEST_FAIL("piece %d is shared", (int)i);
    CHECK_STR(llmcbi_arena_text(&a, &arena, "a\0b", 1), "a");
    CHECK(memcmp(llmcbi_arena_text(&a, &arena, "a\0b", 3), "a\0b", 4) == 0);
    llmcbi_arena_free(&a, &arena);
    CHECK(!arena.at && !arena.left); /* may be used again */
    check_heap(&h);
    calls = h.calls;
    for (size_t fail = 1; fail <= calls; fail++) {
        bool failed = false;
        a = heap_allocator(&h, fail, false);
        for (size_t i = 0; i < N; i++) {
            bool none = !llmcbi_arena_get(&a, &arena, PIECE(i));
            CHECK(none || !failed); /* it sticks */
            failed |= none;
        }
        if (failed)
            CHECK_STR(llmcbi_arena_text(&a, &arena, "text", 4), "");
        CHECK_INT(arena.failed, failed);
        llmcbi_arena_free(&a, &arena);
        check_heap(&h);
    }
    CHECK(!llmcbi_arena_get(&a, &arena, SIZE_MAX) && arena.failed);
}

#undef N
#undef PIECE

/* ---- errors --------------------------------------------------------------*/

/* Nothing that a terminal or a log might act on. */
static bool is_clean(const char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7F ||
            ((unsigned char)*s == 0xC2 && (unsigned char)s[1] >= 0x80 &&
             (unsigned char)s[1] < 0xA0))
            return false;
    return true;
}

TEST(a_cleaned_copy_is_cut_before_half_a_character)
{
    static const char text[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";
    static const size_t ends[] = { 0, 1, 3, 6, 10, 11 }; /* of characters */

    for (size_t cap = 1; cap < 14; cap++) {
        char out[14];
        size_t want = 0;
        for (size_t i = 0; i < 6; i++)
            if (ends[i] < cap) want = ends[i];
        memset(out, 'x', sizeof out);
        llmcbi_copy_clean(out, cap, text, sizeof text - 1);
        CHECK_INT(strlen(out), want);
        CHECK(memcmp(out, text, want) == 0);
    }
}

TEST(a_cleaned_copy_has_no_control_characters)
{
    for (int c = 0; c < 0x180; c++) {
        char in[8] = "a", out[8], *end = llmcbi_put_utf8(in + 1, (uint32_t)c);
        bool control = c < 0x20 || (c >= 0x7F && c < 0xA0);
        *end++ = 'z';
        llmcbi_copy_clean(out, sizeof out, in, (size_t)(end - in));
        CHECK(out[0] == 'a' && is_clean(out));
        CHECK_INT(strlen(out), end - in); /* one for one: a NUL too */
        if ((memcmp(in, out, (size_t)(end - in)) == 0) == control)
            TEST_FAIL("U+%04X", (unsigned)c);
    }
}

/* A server's request id is copied as it is. An error is written into logs
 * and traces, which are UTF-8, and 0x9B alone opens an escape sequence on an
 * 8-bit terminal. */
TEST(a_cleaned_copy_is_utf8_whatever_came)
{
    static const char *const rows[] = {
        "\x9Bz",   "a\xFFz",       "\xC2",     "\xC2z",
        "\xE2\x82", "\xED\xA0\x80", "\xC0\x8A", "\xF0\x9F\x98",
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char out[16];
        llmcbi_copy_clean(out, sizeof out, rows[i], strlen(rows[i]));
        if (!llmcbi_utf8_valid(out, strlen(out))) TEST_FAIL("row %d", (int)i);
    }
}

TEST(an_error_has_a_message_and_grows_as_far_as_it_fits)
{
    static const char *const none[] = { NULL, "" };
    char big[400];
    llmcb_error e;

    for (int i = 0; i < 2; i++) {
        memset(&e, 0xA5, sizeof e);
        llmcbi_error_set(&e, LLMCB_EIO, none[i]);
        CHECK_STR(e.message, llmcb_code_text(LLMCB_EIO));
        CHECK(e.code == LLMCB_EIO && e.retry_after_ms == -1 && !*e.type &&
              !*e.provider_code && !*e.request_id && !e.http_status &&
              !e.sys_errno && !e.handler_result);
    }
    llmcbi_error_add(&e, ": a\nb", 5);
    CHECK(is_clean(e.message) && strlen(e.message) ==
                                     strlen(llmcb_code_text(LLMCB_EIO)) + 5);
    for (size_t i = 0; i + 1 < sizeof big; i += 2)
        memcpy(big + i, "\xC3\xA9", 2);
    for (int odd = 0; odd < 2; odd++) {
        llmcbi_error_set(&e, LLMCB_EIO, odd ? "a" : "ab");
        for (int i = 0; i < 3; i++) llmcbi_error_add(&e, big, sizeof big);
        CHECK_INT(strlen(e.message), odd ? 255 : 254);
        CHECK(llmcbi_utf8_valid(e.message, strlen(e.message)));
    }
}

TEST(an_error_is_kept_or_becomes_the_constant)
{
    heap h;
    llmcb_error e;

    for (size_t fail = 0; fail < 2; fail++) {
        llmcb_allocator a = heap_allocator(&h, fail, true);
        const llmcb_error *kept;
        llmcbi_error_set(&e, LLMCB_ETLS, "special");
        kept = llmcbi_error_keep(&a, &e);
        CHECK_INT(kept->code, LLMCB_ETLS);
        CHECK_STR(kept->message,
                  fail ? llmcb_code_text(LLMCB_ETLS) : "special");
        llmcbi_error_drop(&a, kept);
        llmcbi_error_drop(&a, NULL);
        llmcbi_error_set(&e, LLMCB_OK, NULL); /* needs no memory */
        CHECK(llmcbi_error_keep(&a, &e) == llmcbi_error_const(LLMCB_OK));
        check_heap(&h);
    }
}

/* ---- ids -----------------------------------------------------------------*/

TEST(the_generator_is_xoshiro256starstar)
{
    static const uint64_t want[] = { 11520u,
                                     0u,
                                     1509978240u,
                                     1215971899390074240u,
                                     1216172134540287360u,
                                     607988272756665600u,
                                     16172922978634559625u };
    llmcbi_random r = { { 1, 2, 3, 4 } };

    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        CHECK(llmcbi_random_next(&r) == want[i]);
}

TEST(ids_are_uuids_of_version_4)
{
    static const char hex[] = "0123456789abcdef";
    static bool seen[36][16];
    llmcbi_random r = { { 0, 0, 0, 0 } };
    char id[37], last[37] = "";
    int fd;

    fd = open("/dev/null", O_RDONLY);
    close(fd);
    llmcbi_random_seed(&r);
    CHECK_INT(open("/dev/null", O_RDONLY), fd); /* it keeps no descriptor */
    close(fd);
    for (int n = 0; n < 5000; n++) {
        memset(id, 'x', sizeof id);
        llmcbi_uuid(&r, id);
        CHECK(strlen(id) == 36 && strcmp(id, last) != 0);
        CHECK(llmcbi_uuid_valid(id));
        memcpy(last, id, sizeof id);
        for (int i = 0; i < 36; i++) {
            const char *digit = strchr(hex, id[i]);
            if (digit) seen[i][digit - hex] = true;
        }
    }
    for (int i = 0; i < 36; i++) {
        bool dash = i == 8 || i == 13 || i == 18 || i == 23;
        CHECK(!dash || id[i] == '-');
        for (int d = 0; d < 16; d++) {
            bool want = i == 14 ? d == 4 : i == 19 ? d >> 2 == 2 : !dash;
            if (seen[i][d] != want) TEST_FAIL("place %d, %c", i, hex[d]);
        }
    }
}

TEST(an_id_that_is_no_uuid_is_refused)
{
    static const char good[] = "01234567-89ab-CDEF-0123-456789abcdef";
    static const char others[] = "g@/:`G -";
    char s[38];

    CHECK(llmcbi_uuid_valid(good));
    CHECK(!llmcbi_uuid_valid("01234567-89ab-cdef-0123-456789abcdef0"));
    CHECK(!llmcbi_uuid_valid("{1234567-89ab-cdef-0123-456789abcdef}"));
    for (size_t n = 0; n < 36; n++) {
        char *exact = malloc(n + 1); /* one byte more would be seen */
        memcpy(exact, good, n);
        exact[n] = '\0';
        CHECK(!llmcbi_uuid_valid(exact));
        free(exact);
        for (size_t k = 0; others[k]; k++) {
            memcpy(s, good, sizeof good);
            if (s[n] == others[k]) continue;
            s[n] = others[k];
            if (llmcbi_uuid_valid(s)) TEST_FAIL("accepted: %s", s);
        }
    }
}

/* ---- UTF-8 ---------------------------------------------------------------*/

/* The decoder of the Encoding Standard, which replaces maximal subparts, as
 * text to text. Returns the number of bytes written. */
static size_t reference_decode(const unsigned char *s, size_t n, char *out,
                               bool *valid)
{
    unsigned lower = 0x80, upper = 0xBF, need = 0;
    size_t start = 0, o = 0;

    *valid = true;
    for (size_t i = 0; i <= n; i++) {
        if (need && (i == n || s[i] < lower || s[i] > upper)) {
            memcpy(out + o, "\xEF\xBF\xBD", 3);
            o += 3;
            need = 0;
            *valid = false;
            lower = 0x80, upper = 0xBF;
        }
        if (i == n) break;
        if (need) {
            lower = 0x80, upper = 0xBF;
            if (--need) continue;
            memcpy(out + o, s + start, i + 1 - start);
            o += i + 1 - start;
            continue;
        }
        start = i;
        if (s[i] < 0x80) {
            out[o++] = (char)s[i];
        } else if (s[i] >= 0xC2 && s[i] <= 0xDF) {
            need = 1;
        } else if (s[i] >= 0xE0 && s[i] <= 0xEF) {
            if (s[i] == 0xE0) lower = 0xA0;
            if (s[i] == 0xED) upper = 0x9F;
            need = 2;
        } else if (s[i] >= 0xF0 && s[i] <= 0xF4) {
            if (s[i] == 0xF0) lower = 0x90;
            if (s[i] == 0xF4) upper = 0x8F;
            need = 3;
        } else {
            memcpy(out + o, "\xEF\xBF\xBD", 3);
            o += 3;
            *valid = false;
        }
    }
    return o;
}

static size_t decode(const unsigned char *s, size_t n, char *out)
{
    llmcbi_carry c;
    char *o = out;

    memset(&c, 0, sizeof c);
    for (size_t i = 0; i < n; i++) {
        o = llmcbi_put_byte(o, &c, s[i]);
        if ((size_t)(o - out) > i + 1 + 6 + 2 * i) return SIZE_MAX;
    }
    return (size_t)(llmcbi_carry_flush(o, &c) - out);
}

static bool same_as_reference(const unsigned char *s, size_t n)
{
    char want[64], got[64], more[8];
    bool valid;
    size_t len = reference_decode(s, n, want, &valid);

    memset(more, 0x80, sizeof more); /* what would go on behind the end */
    memcpy(more, s, n);
    return decode(s, n, got) == len && memcmp(got, want, len) == 0 &&
           llmcbi_utf8_valid(more, n) == valid && llmcbi_utf8_valid(got, len);
}

static void check_utf8(const unsigned char *s, size_t n)
{
    if (!same_as_reference(s, n))
        TEST_FAIL("%02X %02X %02X %02X", s[0], n > 1 ? s[1] : 0,
                  n > 2 ? s[2] : 0, n > 3 ? s[3] : 0);
}

TEST(utf8_of_up_to_three_bytes_completely)
{
    unsigned char s[4];

    CHECK(llmcbi_utf8_valid("", 0));
    for (unsigned i = 0; i < 0x10000; i++) {
        s[0] = (unsigned char)(i >> 8), s[1] = (unsigned char)i;
        if (s[1] == 0) check_utf8(s, 1);
        check_utf8(s, 2);
        /* the third byte matters behind these only */
        for (unsigned b = 0; b < 256 && s[0] >= 0xDF && s[0] < 0xF6; b++) {
            s[2] = (unsigned char)b;
            check_utf8(s, 3);
        }
    }
}

TEST(utf8_of_four_bytes_at_the_edges)
{
    static const unsigned char edges[] = {
        0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF,
        0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF
    };
    size_t n = sizeof edges;

    for (size_t i = 0; i < n * n * n * n; i++) {
        unsigned char s[4];
        s[0] = edges[i % n], s[1] = edges[i / n % n];
        s[2] = edges[i / n / n % n], s[3] = edges[i / n / n / n];
        check_utf8(s, 4);
    }
}

/* The example of the Unicode standard, table 3-8. */
TEST(maximal_subparts_are_replaced_one_by_one)
{
    static const unsigned char in[] = { 0x61, 0xF1, 0x80, 0x80, 0xE1,
                                        0x80, 0xC2, 0x62, 0x80, 0x63,
                                        0x80, 0xBF, 0x64 };
    char out[64];
    size_t n = decode(in, sizeof in, out);

    out[n] = '\0';
    CHECK_STR(out, "a\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"
                   "b\xEF\xBF\xBD"
                   "c\xEF\xBF\xBD\xEF\xBF\xBD"
                   "d");
}

TEST(every_code_point_is_written_as_one_valid_character)
{
    for (uint32_t cp = 0; cp < 0x110000; cp++) {
        char out[4];
        size_t n = (size_t)(llmcbi_put_utf8(out, cp) - out);
        bool surrogate = cp >= 0xD800 && cp < 0xE000;
        size_t want = cp < 0x80 ? 1 : cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
        if (n != want || llmcbi_utf8_valid(out, n) == surrogate ||
            llmcbi_utf8_size((unsigned char)*out) != (int)n)
            TEST_FAIL("U+%04X", (unsigned)cp);
    }
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}
