/* llmcb.h for tests of its public functions. A program has the implementation
 * in it, or, with -DTEST_LINKED, is linked with impl.c or sys.c, so that it
 * is compiled once for many. */
#ifndef IMPL_H
#define IMPL_H

#if !defined(TEST_LINKED) && !defined(LLMCB_IMPLEMENTATION)
#define LLMCB_IMPLEMENTATION
#endif
#include "../llmcb.h"
#ifdef TEST_LINKED /* what the implementation includes */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#ifndef LLMCB_NO_CURL
#include <curl/curl.h>
#endif
#endif
#endif
