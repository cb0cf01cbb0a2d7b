# The serial port by interrupt: THRE when it is enabled, then every received byte echoed.
# A capital Q ends the guest.
.include "common.inc"
    GATE 0x24, com1
    PIC 0xef
    mov dx, COM1 + 3
    mov al, 3
    out dx, al
    mov dx, COM1 + 2
    mov al, 7
    out dx, al
    mov dx, COM1 + 4
    mov al, 0x0b
    out dx, al
    sti
    mov dx, COM1 + 1                # transmitter-empty must interrupt at once
    mov al, 2
    out dx, al
wait_thre:
    cmp byte ptr [seen_thre], 1
    je ready
    hlt
    jmp wait_thre
ready:
    mov al, 1                       # now only received data
    out dx, al
    mov esi, offset greeting
    mov dx, COM1
    mov ecx, offset greeting_end - greeting
    rep outsb
idle:
    hlt
    jmp idle
com1:
    pusha
again:
    mov dx, COM1 + 2
    in al, dx
    and al, 0x0f
    cmp al, 1                       # nothing pending
    je done
    cmp al, 2                       # transmitter empty
    jne receive
    mov byte ptr [seen_thre], 1
    jmp again
receive:
    mov dx, COM1
    in al, dx
    out dx, al
    cmp al, 'Q'
    jne again
    EXIT 0x11
done:
    mov al, 0x20
    out 0x20, al
    popa
    RETURN
seen_thre: .byte 0
greeting: .ascii "ready\n"
greeting_end:
.fill 1024, 1, 0
bss_end:
