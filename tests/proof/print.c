/* [CHAT]: llmcb_str_print, which keeps a terminal from acting on a text. */
/* reached: 95 */
#define PROOF_STDIO
#include "proof.h"
#include <stdio.h>
#define N 12

int main(void)
{
    int n = Frama_C_interval(0, N);

    /*@ split n; */
    llmcb_str_print(llmcbi_slice(any_bytes(n), n), stdout);
    return 0;
}
