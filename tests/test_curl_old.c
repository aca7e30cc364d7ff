/* The same tests with what a libcurl older than 7.80 has: it says in another
 * way that there is a connection, and can do less. */
#define OLD_CURL
#include "test_curl.c"
