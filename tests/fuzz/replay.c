/* All targets in one program, so that the header is compiled once:
 *
 *     replay TARGET FILE...
 */
#define FUZZ_ENGINE
#include "fuzz.h"
#undef FUZZ_ENGINE

#define LLVMFuzzerTestOneInput fuzz_chat
#include "chat.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_chunk
#include "chunk.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_clean
#include "clean.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_date
#include "date.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_http
#include "http.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_json
#include "json.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_print
#include "print.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_sse
#include "sse.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_url
#include "url.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_wire
#include "wire.c"
#undef LLVMFuzzerTestOneInput

static const struct {
    const char *name;
    int (*run)(const uint8_t *data, size_t size);
} targets[] = {
    { "chat", fuzz_chat },   { "chunk", fuzz_chunk }, { "clean", fuzz_clean },
    { "date", fuzz_date },   { "http", fuzz_http },   { "json", fuzz_json },
    { "print", fuzz_print }, { "sse", fuzz_sse },     { "url", fuzz_url },
    { "wire", fuzz_wire }
};

int main(int argc, char **argv)
{
    size_t i;

    for (i = 0; argc > 1 && i < sizeof targets / sizeof *targets; i++)
        if (strcmp(argv[1], targets[i].name) == 0)
            return fuzz_replay(targets[i].run, argc - 1, argv + 1);
    fprintf(stderr, "no such target\n");
    return 2;
}
