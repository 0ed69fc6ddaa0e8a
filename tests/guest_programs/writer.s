# Writes to a disk and reads it back, sector 5 of drive 80: says "writer ready"; key w writes the pattern ("write ok"), r shows
# the first 8 bytes in hex ("read 5752495454454e21"), 0 to 7 choose drive 80 to 87 ("drive 81"). What fails says "error AH".
        .set    WANT_GETC, 1
        .set    SECTOR, 0x8000
        .include "prologue.inc"
        mov     si, offset ready
        call    puts
again:  call    getc
        cmp     al, 'w'
        je      write
        cmp     al, 'r'
        je      read
        sub     al, '0'
        cmp     al, 8
        jae     again
        add     al, 0x80
        mov     [drive], al
        mov     si, offset drives
        call    puts
        mov     al, [drive]
        call    hex8
        jmp     next

write:  mov     di, SECTOR
        mov     cx, 512 / 8
1:      push    cx
        mov     si, offset pattern
        mov     cx, 8
        rep     movsb
        pop     cx
        loop    1b
        mov     si, offset writes
        call    puts
        mov     ax, 0x4300              # write, do not verify
        call    disk
        jc      failed
        mov     si, offset ok
        call    puts
        jmp     next

read:   mov     si, offset reads
        call    puts
        mov     ah, 0x42
        call    disk
        jc      failed
        mov     si, SECTOR
        mov     cx, 8
1:      lodsb
        call    hex8
        loop    1b
        jmp     next

failed: mov     si, offset error
        call    puts
        mov     al, ah
        call    hex8
next:   call    newline
        jmp     again

disk:   mov     si, offset packet
        mov     dl, [drive]
        int     0x13
        ret

        .include "serial.inc"
packet: .byte   16, 0
        .word   1, SECTOR, 0            # one sector, offset, segment
        .quad   5                       # sector number
drive:  .byte   0x80
pattern: .ascii "WRITTEN!"
ready:  .asciz  "writer ready\r\n"
drives: .asciz  "drive "
writes: .asciz  "write "
reads:  .asciz  "read "
ok:     .asciz  "ok"
error:  .asciz  "error "
