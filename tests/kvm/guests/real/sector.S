# A boot sector. Says its label on the serial port and what is in sector 1 of another drive, counts
# boots in sector 2 of its own, and after the first one spoils the BIOS's copy and resets. The test
# writes label and other drive; a drive that cannot be written, as a CD-ROM, ends it at once.
.intel_syntax noprefix
.set BUFFER, 0x8000
.code16
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    cld
    mov [drive], dl
    mov si, offset label
    call print
    mov dl, [other]
    call read
    jc own
    mov si, BUFFER
    call print
own:
    mov byte ptr [block], 2
    mov dl, [drive]
    call read
    jc off
    inc byte ptr [BUFFER]
    mov ax, 0x4300
    mov dl, [drive]
    mov si, offset packet
    int 0x13
    jc read_only
    cmp byte ptr [BUFFER], 2
    je off
    cli                             # the timer's handler goes as well
    mov ax, 0xf000                  # nothing of this must be there after the reset
    mov es, ax
    xor di, di
    mov cx, 0x8000
    xor ax, ax
    rep stosw
    mov dx, 0xcf9
    mov al, 2
    out dx, al
    mov al, 6
    out dx, al
    hlt
read_only:
    mov si, offset says_read_only
    call print
off:
    mov dx, 0x604                   # PM1a control: S5
    mov ax, 0x3400
    out dx, ax
    hlt

read:                               # dl: drive; carry set if it is not there
    mov ah, 0x42
    mov si, offset packet
    int 0x13
    ret

print:                              # si: bytes up to a zero, to COM1
    mov dx, 0x3f8
print_next:
    lodsb
    test al, al
    jz print_done
    out dx, al
    jmp print_next
print_done:
    ret

says_read_only:
    .asciz "read-only\n"
drive:
    .byte 0
packet:                             # int 13h, function 42h: one block to BUFFER
    .byte 16, 0
    .word 1, BUFFER, 0
block:
    .quad 1
.org 0x1cf
other:
    .byte 0
label:                              # at 0x1d0, up to 46 bytes and a zero
    .org 510
    .word 0xaa55
