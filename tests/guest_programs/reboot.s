# Says "up"; key R resets the machine by port CF9, K by the keyboard controller, P switches it off by its ACPI port.
        .set    WANT_GETC, 1
        .include "prologue.inc"
        mov     si, offset up
        call    puts
again:  call    getc
        cmp     al, 'R'
        je      reset
        cmp     al, 'K'
        je      keyboard
        cmp     al, 'P'
        jne     again
        mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        jmp     again
reset:  mov     dx, 0xcf9
        mov     al, 6
        out     dx, al
        jmp     again
keyboard:
        mov     al, 0xfe
        out     0x64, al
        jmp     again
        .include "serial.inc"
up:     .asciz  "up\r\n"
