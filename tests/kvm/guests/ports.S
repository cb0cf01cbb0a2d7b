# Port accesses of every width, the rule for unclaimed ports, and REP INS/OUTS.
.include "common.inc"
    mov dx, 0x2f0                   # nobody there
    in al, dx
    cmp al, 0xff
    EXPECT "byte from an empty port"
    in ax, dx
    cmp ax, 0xffff
    EXPECT "word from an empty port"
    in eax, dx
    cmp eax, 0xffffffff
    EXPECT "dword from an empty port"
    out dx, eax

    mov dx, COM1 + 7                # the scratch register holds what is written
    mov al, 0x5a
    out dx, al
    mov al, 0
    in al, dx
    cmp al, 0x5a
    EXPECT "scratch register"

    mov dx, COM1 + 7                # a word at the last register: one byte answers, one is empty
    in ax, dx
    cmp ax, 0xff5a
    EXPECT "word across the end of a chip"

    mov dx, 0x402
    in al, dx
    cmp al, 0xe9
    EXPECT "debug console magic"
    mov esi, offset text
    mov ecx, offset text_end - text
    cld
    rep outsb

    mov dx, COM1 + 7
    mov edi, offset buffer
    mov ecx, 16
    rep insb
    mov esi, offset buffer
    mov ecx, 16
check:
    lodsb
    cmp al, 0x5a
    EXPECT "rep insb"
    loop check
    EXIT 0x10
text: .ascii "string output works\n"
text_end:
buffer: .fill 16, 1, 0
.fill 1024, 1, 0
bss_end:
