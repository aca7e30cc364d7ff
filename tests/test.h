/* The test runner: one file, included by every test program.
 *
 *     TEST(json_reads_numbers)
 *     {
 *         CHECK(1 + 1 == 2);
 *         CHECK_STR(text, "expected");
 *         if (!have_nginx) SKIP("nginx is not installed");
 *     }
 *     int main(int argc, char **argv) { return test_main(argc, argv); }
 *
 * A program runs the tests whose names contain its argument, all without
 * one, prints one line a failure or skip, with -v before the argument one a
 * test, and, at the end, "NAME: N passed, N failed, N skipped". Tests register themselves through
 * constructors, which both compilers of the suite have. */
#ifndef TEST_H
#define TEST_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct test_case {
    const char *name;
    void (*run)(void);
    struct test_case *next;
} test_case;

static test_case *test_first, **test_last = &test_first;
static int test_failures_here, test_skipped_here;

static inline void test_add(test_case *t)
{
    *test_last = t;
    test_last = &t->next;
}

#define TEST(id)                                                      \
    static void test_run_##id(void);                                  \
    static test_case test_case_##id = { #id, test_run_##id, NULL };   \
    __attribute__((constructor)) static void test_register_##id(void) \
    {                                                                 \
        test_add(&test_case_##id);                                    \
    }                                                                 \
    static void test_run_##id(void)

#define TEST_FAIL(...)                                   \
    do {                                                 \
        if (test_failures_here++ < 20) {                 \
            printf("  %s:%d: ", __FILE__, __LINE__);     \
            printf(__VA_ARGS__);                         \
            printf("\n");                                \
        }                                                \
    } while (0)

/* A check goes on after a failure; REQUIRE leaves the test. */
#define CHECK(cond)                                   \
    do {                                              \
        if (!(cond)) TEST_FAIL("failed: %s", #cond);  \
    } while (0)
#define REQUIRE(cond)                                 \
    do {                                              \
        if (!(cond)) {                                \
            TEST_FAIL("failed: %s", #cond);           \
            return;                                   \
        }                                             \
    } while (0)
#define CHECK_INT(got, want)                                              \
    do {                                                                  \
        long long got_ = (long long)(got), want_ = (long long)(want);     \
        if (got_ != want_)                                                \
            TEST_FAIL("%s is %lld, not %lld", #got, got_, want_);         \
    } while (0)
#define CHECK_STR(got, want)                                              \
    do {                                                                  \
        const char *got_ = (got), *want_ = (want);                        \
        if (!got_ || strcmp(got_, want_) != 0)                            \
            TEST_FAIL("%s is \"%s\", not \"%s\"", #got,                   \
                      got_ ? got_ : "(null)", want_);                     \
    } while (0)
#define SKIP(why)                                                    \
    do {                                                             \
        printf("  skipped: %s: %s\n", test_current, why);            \
        test_skipped_here = 1;                                       \
        return;                                                      \
    } while (0)

static const char *test_current = "";

/* The end of a child process that is to count in a measurement of coverage:
 * _exit says nothing of what was run. */
#ifdef __ELF__
void __gcov_dump(void) __attribute__((weak));
int __llvm_profile_write_file(void) __attribute__((weak));
#endif
static inline void test_exit(int status)
{
#ifdef __ELF__
    if (__gcov_dump) __gcov_dump();
    if (__llvm_profile_write_file) __llvm_profile_write_file();
#endif
    _exit(status);
}

static inline int test_main(int argc, char **argv)
{
    int passed = 0, failed = 0, skipped = 0;
    const char *base = strrchr(argv[0], '/');
    int verbose = argc > 1 && strcmp(argv[1], "-v") == 0;
    const char *part = argc > 1 + verbose ? argv[1 + verbose] : "";

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (test_case *t = test_first; t; t = t->next) {
        if (!strstr(t->name, part)) continue;
        test_failures_here = test_skipped_here = 0;
        test_current = t->name;
        t->run();
        if (test_failures_here) {
            printf("  FAILED: %s\n", t->name);
            failed++;
        } else if (test_skipped_here) {
            skipped++;
        } else {
            passed++;
            if (verbose) printf("ok %s\n", t->name);
        }
    }
    printf("%s: %d passed, %d failed, %d skipped\n",
           base ? base + 1 : argv[0], passed, failed, skipped);
    return failed ? 1 : 0;
}
#endif
