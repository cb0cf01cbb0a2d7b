# Resets as fast as it can, for ever.
.include "common.inc"
    mov al, 0xfe
    out 0x64, al
    hlt
.fill 64, 1, 0
bss_end:
