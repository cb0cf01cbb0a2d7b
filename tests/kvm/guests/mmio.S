# Memory-mapped accesses in the forms that drivers use, to whatever sits at 0xf0000000.
# The test's device there reads as its offset times 0x01010101 and remembers writes.
.include "common.inc"
.set DEVICE, 0xf0000000
    mov ebx, DEVICE
    mov al, [ebx + 4]
    cmp al, 4
    EXPECT "byte read"
    mov ax, [ebx + 8]
    cmp ax, 0x0808
    EXPECT "word read"
    mov eax, [ebx + 12]
    cmp eax, 0x0c0c0c0c
    EXPECT "dword read"
    movzx eax, byte ptr [ebx + 16]
    cmp eax, 0x10
    EXPECT "movzx"
    mov byte ptr [ebx + 0x20], 0x11
    mov word ptr [ebx + 0x24], 0x2233
    mov dword ptr [ebx + 0x28], 0x44556677
    mov eax, 0x8899aabb
    mov [ebx + 0x2c], eax
    or dword ptr [ebx + 0x30], 1    # reads 0x30303030, writes 0x30303031
    mov edi, DEVICE + 0x40
    mov eax, 0xdeadbeef
    mov ecx, 3
    cld
    rep stosd
    mov eax, [0xf8000000]           # nobody there
    cmp eax, 0xffffffff
    EXPECT "empty address"
    mov dword ptr [0xf8000000], 7
    EXIT 0x13
.fill 1024, 1, 0
bss_end:
