/* Retry-After: dates are those of the C library, seconds are exact, nothing
 * overflows. The first 8 bytes are a time, too; all of it is the value. */
#include "fuzz.h"

static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";

static int number(const char *s, int digits)
{
    int v = 0;

    while (digits--) {
        if (*s < '0' || *s > '9') return -1;
        v = v * 10 + (*s++ - '0');
    }
    return v;
}

/* What a date says that was accepted. */
static int64_t by_library(const char *s)
{
    struct tm tm;

    memset(&tm, 0, sizeof tm);
    tm.tm_mday = number(s + 5, 2);
    for (tm.tm_mon = 0; memcmp(months + 3 * tm.tm_mon, s + 8, 3) != 0;)
        FUZZ_CHECK(++tm.tm_mon < 12);
    tm.tm_year = number(s + 12, 4) - 1900;
    tm.tm_hour = number(s + 17, 2);
    tm.tm_min = number(s + 20, 2);
    tm.tm_sec = number(s + 23, 2);
    FUZZ_CHECK(tm.tm_mday > 0 && tm.tm_year >= 70 && tm.tm_hour >= 0 &&
               tm.tm_min >= 0 && tm.tm_sec >= 0);
    return (int64_t)timegm(&tm);
}

/* The other way round, for years with four digits. */
static void check_time(int64_t t)
{
    char s[64];
    time_t seconds = (time_t)(t % 253402300800);
    struct tm tm;
    int n;

    if (!gmtime_r(&seconds, &tm)) abort();
    n = snprintf(s, sizeof s, "Day, %02d %.3s %04d %02d:%02d:%02d GMT",
                 tm.tm_mday, months + 3 * tm.tm_mon, tm.tm_year + 1900,
                 tm.tm_hour, tm.tm_min, tm.tm_sec);
    FUZZ_CHECK(n == 29);
    FUZZ_CHECK(llmcbi_parse_date(fuzz_slice(s, 29)) == (int64_t)seconds);
    FUZZ_CHECK(llmcbi_retry_after(fuzz_slice(s, 29),
                                  (int64_t)seconds * 1000 - 1500) == 2000);
}

/* Digits and perhaps a point and more digits, in units of 1/unit. */
static void check_seconds(llmcb_str s, int64_t unit, int64_t got)
{
    int64_t want = 0, part = unit;
    size_t i = 0, whole;

    for (; i < s.len && s.ptr[i] >= '0' && s.ptr[i] <= '9'; i++)
        if (i < 13) want = want * 10 + (s.ptr[i] - '0');
    whole = i;
    want *= unit;
    if (i && i < s.len && s.ptr[i] == '.')
        for (i++; i < s.len && s.ptr[i] >= '0' && s.ptr[i] <= '9'; i++)
            want += (part /= 10) * (s.ptr[i] - '0');
    if (!whole || i < s.len)
        FUZZ_CHECK(got == LLMCBI_NO_WISH);
    else if (whole <= 13)
        FUZZ_CHECK(got == want);
    else
        FUZZ_CHECK(got >= want || want > INT64_MAX / 100);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *exact = fuzz_copy((const char *)data, size);
    llmcb_str s = fuzz_slice(exact, size);
    int64_t date = llmcbi_parse_date(s), now, wish;
    uint64_t t = 0;

    if (size >= 8) memcpy(&t, data, 8);
    check_time((int64_t)(t >> 1));
    if (date != -1) FUZZ_CHECK(size == 29 && date == by_library(exact));
    check_seconds(s, 1, llmcbi_parse_seconds(s, 1));
    check_seconds(s, 1000, llmcbi_parse_seconds(s, 1000));
    now = (int64_t)(t % 4102444800000u);
    wish = llmcbi_retry_after(s, now);
    FUZZ_CHECK(wish >= -1);
    if (date >= 0)
        FUZZ_CHECK(wish % 1000 == 0 &&
                   (wish == 0 ? date * 1000 <= now
                              : wish >= date * 1000 - now &&
                                    wish < date * 1000 - now + 1000));
    free(exact);
    return 0;
}
