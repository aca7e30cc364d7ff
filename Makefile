# The header needs no building. This builds and runs what is around it:
#
#   make demo        examples/async_callbacks.c, offline, with no package
#   make examples    all examples, into build/examples
#   make test        all tests; T=name: only those with this in their name
#   make check       the gate of a commit: tests, all warnings, analysers
#   make fuzz        looks for more with libFuzzer for FUZZ_SECONDS
#   make afl         the same with AFL++, AFL_SECONDS for each target
#   make mutants     breaks the header at random and looks who notices
#   make load        10,000 streams that fail in all ways; LOAD_SECONDS of soak
#   make campaign    check, and what takes hours (tests/README.md)
#   make bench       what a token and a stream cost (tests/bench/README.md);
#                    bench-full takes longer, bench-instructions is exact
#   make clean
#
# CC=clang and the like are honoured. SKIPS=fail: what cannot be tested on
# this machine counts as failed. SETUP=no: install no package.

# Sanitizers make optimised builds three times as slow to build; -Og, of what
# is linked with many, pays.
CFLAGS ?= -g
SKIPS ?=
T ?=
export CC CFLAGS LDFLAGS SKIPS T

# Whether there is libcurl, and how it is linked.
CURL := $(shell d=$$(mktemp -d) && \
	printf '\043include <curl/curl.h>\n%s\n' \
	'int main(void) { return !curl_version(); }' >$$d/a.c; \
	f=$$(pkg-config --cflags --libs libcurl 2>/dev/null || echo -lcurl); \
	$(CC) -o $$d/a $$d/a.c $$f >/dev/null 2>&1 && echo "$$f"; rm -rf $$d)
ifeq ($(CURL),)
CURL := -DLLMCB_NO_CURL
endif

# The examples on another library's loop are built where that is.
UV := $(shell pkg-config --cflags --libs libuv 2>/dev/null)
GLIB := $(shell pkg-config --cflags --libs glib-2.0 2>/dev/null)
EXAMPLES := $(filter-out $(if $(UV),,embed_uv) $(if $(GLIB),,embed_glib), \
	$(patsubst examples/%.c,%,$(wildcard examples/*.c)))
TESTS := $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
# Programs that ThreadSanitizer cannot run, or that have no threads of their
# own; libcurl, which it does not see into, closes descriptors that a server
# then has anew.
NO_TSAN := test_base test_json test_sse test_http test_wire test_walk \
	test_curl test_curl_old test_chat_small test_faults_small
# Those that run with it in make check alone, for time: their threads are
# those of others.
LATE_TSAN := test_loop_poll test_task_poll test_syscalls test_security \
	test_tls test_load test_scenarios test_sock test_faults \
	test_environment
# Programs that run in make check alone: they are others in another form.
LATE := test_syscalls_poll test_faults_small
export NO_TSAN LATE_TSAN LATE
TSANS := $(filter-out $(NO_TSAN),$(TESTS))
# The sanitizers; tests/run.sh empties one that the compiler lacks.
ASAN ?= -fsanitize=address,undefined -fno-sanitize-recover
TSAN ?= -fsanitize=thread
WARN := -Wall -Wextra
# What a test needs beyond that stands in it: /* build: -lm */
extra = $(shell sed -n 's|^/\* build: \(.*\) \*/$$|\1|p' $<)

all: examples

demo: build/demo
	build/demo
build/demo: examples/async_callbacks.c llmcb.h
	@mkdir -p $(@D) && rm -f $@
	$(CC) -I. -o $@ $< -DLLMCB_NO_CURL -lpthread

examples: $(EXAMPLES:%=build/examples/%)
build/examples/embed_uv: LIBS = $(UV:-I%=-isystem%)
build/examples/embed_glib: LIBS = $(GLIB:-I%=-isystem%)
build/examples/%: examples/%.c llmcb.h
	@mkdir -p $(@D) && rm -f $@
	$(CC) -std=c99 $(WARN) $(CFLAGS) -I. -o $@ $< $(LDFLAGS) -lpthread \
		$(CURL) $(LIBS)

# The programs of make test, in both forms. Those that use the public
# functions are linked with one implementation, the others have their own.
IMPL := test_call test_cases test_load test_scenarios test_task test_tls
SYS := test_environment test_faults test_security test_syscalls
$(IMPL:%=build/tests/%): build/tests/impl.o
$(IMPL:%=build/tsan/%): build/tsan/impl.o
$(SYS:%=build/tests/%): build/tests/sys.o
$(SYS:%=build/tsan/%): build/tsan/sys.o
SHARED := llmcb.h $(wildcard tests/*.h) examples/chain.c tests/load.c
define compile
@mkdir -p $(@D) && rm -f $@
$(CC) $(WARN) $(CFLAGS) $(1) -I. -o $@ $< $(if $(filter %.o,$@), \
	-Og -c $(filter-out -l% -L%,$(CURL)), \
	$(if $(filter %.o,$^),-DTEST_LINKED $(filter %.o,$^)) \
	$(LDFLAGS) -lpthread $(extra) $(CURL))
endef
programs: $(TESTS:%=build/tests/%) $(TSANS:%=build/tsan/%) build/tests/serve
build/tests/%: tests/%.c $(SHARED)
	$(call compile,$(ASAN))
# What another program includes.
build/tests/test_chat_small: tests/test_chat.c
build/tests/test_curl_old: tests/test_curl.c
build/tests/test_faults_small: tests/test_faults.c
build/tests/test_loop_poll build/tsan/test_loop_poll: tests/test_loop.c
build/tests/test_task_poll build/tsan/test_task_poll: tests/test_task.c
build/tests/test_syscalls_poll build/tsan/test_syscalls_poll: \
	tests/test_syscalls.c
build/tests/%.o: tests/%.c $(SHARED)
	$(call compile,$(ASAN))
build/tsan/%: tests/%.c $(SHARED)
	$(call compile,$(TSAN))
build/tsan/%.o: tests/%.c $(SHARED)
	$(call compile,$(TSAN))
build/tests/serve: tests/serve.c tests/server.h
	@mkdir -p $(@D) && rm -f $@
	$(CC) $(WARN) $(CFLAGS) -o $@ $< $(LDFLAGS) -lpthread

test:
	@tests/run.sh test
check:
	@tests/run.sh check

FUZZ_SECONDS ?= 600
fuzz:
	@CFLAGS='-O1 -g' tests/fuzz/run.sh campaign $(FUZZ_SECONDS)

AFL_SECONDS ?= 60
afl:
	@CFLAGS='-O1 -g' tests/fuzz/run.sh afl $(AFL_SECONDS)

mutants:
	@tests/campaign_mutants.sh

LOAD_SECONDS ?= 60
load: build/load
	build/load && build/load soak $(LOAD_SECONDS)
build/load: tests/load.c llmcb.h $(wildcard tests/*.h)
	@mkdir -p $(@D) && rm -f $@
	$(CC) $(WARN) -O2 -g -I. -o $@ $< $(LDFLAGS) -lpthread

campaign:
	@tests/campaign.sh

BENCH := server client client_curl micro ref_recv ref_scan
bench-programs: $(BENCH:%=build/tests/bench/%)
define bench-program
	@mkdir -p $(@D) && rm -f $@
	$(CC) -std=c99 -D_GNU_SOURCE $(WARN) -O2 -g -I. -o $@ $< $(LDFLAGS) \
		-lpthread $(extra) $(CURL)
endef
build/tests/bench/client: CURL := -DLLMCB_NO_CURL
build/tests/bench/client_curl: tests/bench/client.c llmcb.h tests/bench/bench.h
	$(bench-program)
build/tests/bench/%: tests/bench/%.c llmcb.h $(wildcard tests/bench/*.h)
	$(bench-program)
bench: bench-programs
	@tests/bench/run.sh quick
bench-full: bench-programs
	@tests/bench/run.sh full
bench-instructions: bench-programs
	@tests/bench/callgrind.sh compare

clean:
	rm -rf build

.PHONY: all demo examples programs test check fuzz afl mutants load campaign
.PHONY: clean bench bench-full bench-instructions bench-programs
