# A firmware image's code, at the start of the last 64 KiB; the test adds the reset vector, which
# jumps here. Looks at its two copies and at fw_cfg, resets, looks again, and ends.
.intel_syntax noprefix
.set ALIAS, 0xffff0000              # the same bytes below 4 GiB
.set COUNTER, 0x180000              # RAM that survives a reset
.set DESCRIPTOR, 0x1000
.set BUFFER, 0x2000

.macro PRINT text
    mov esi, offset 900f
    call print
    jmp 901f
900: .asciz "\text"
901:
.endm

.macro EXIT status
    mov al, \status
    out 0xf4, al
    hlt
.endm

.macro EXPECT text                  # fail with a message unless the flags say "equal"
    je 902f
    PRINT "wrong: \text\n"
    EXIT 1
902:
.endm

.code16
start:                              # real mode, F000:0000
    cli
    lgdtd cs:[gdt_pointer - start]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    ljmpd 8, offset entered
.code32
entered:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, 0x8000
    PRINT "rom\n"
    cmp dword ptr [probe], 0x12345678
    EXPECT "the copy is not fresh"
    cmp dword ptr ds:[ALIAS + (probe - start)], 0x12345678
    EXPECT "no ROM below 4 GiB"
    mov dword ptr ds:[ALIAS + (probe - start)], 0xdeadbeef
    cmp dword ptr ds:[ALIAS + (probe - start)], 0x12345678
    EXPECT "the ROM can be written"
    cmp dword ptr [probe], 0x12345678
    EXPECT "a write to the ROM reached the copy"
    mov dword ptr [probe], 0xdeadbeef
    cmp dword ptr [probe], 0xdeadbeef
    EXPECT "the copy is no RAM"

    mov dx, 0x510                   # fw_cfg by port: the signature
    xor eax, eax
    out dx, ax
    inc dx
    mov edi, BUFFER
    mov ecx, 4
    cld
    rep insb
    cmp dword ptr [BUFFER], 0x554d4551
    EXPECT "no QEMU"
    mov dword ptr [DESCRIPTOR], 0x0a000100      # by DMA: select item 1 and read, big-endian
    mov dword ptr [DESCRIPTOR + 4], 0x04000000
    mov dword ptr [DESCRIPTOR + 8], 0
    mov dword ptr [DESCRIPTOR + 12], 0x00200000
    mov dx, 0x518
    mov eax, 0x00100000
    out dx, eax
    cmp dword ptr [DESCRIPTOR], 0
    EXPECT "DMA failed"
    cmp dword ptr [BUFFER], 3
    EXPECT "wrong id"

    inc dword ptr [COUNTER]
    cmp dword ptr [COUNTER], 2
    je twice
    mov dx, 0xcf9
    mov al, 2
    out dx, al
    mov al, 6
    out dx, al
    EXIT 1
twice:
    EXIT 0x14

print:                              # esi: bytes up to a zero, to the debug console
    mov dx, 0x402
print_next:
    lodsb
    test al, al
    jz print_done
    out dx, al
    jmp print_next
print_done:
    ret

.align 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
probe:
    .long 0x12345678
