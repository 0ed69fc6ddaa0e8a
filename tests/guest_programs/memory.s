# How much memory the BIOS says there is to use: "memory NM", whole MiB in decimal (what the BIOS keeps is less than one).
        .include "prologue.inc"
        .set    ENTRY, 0x8000           # base (8 bytes), length (8), kind (4)
        .set    SUM, 0x8040
        xor     eax, eax
        mov     [SUM], eax
        mov     [SUM + 4], eax
        xor     ebx, ebx
next:   mov     eax, 0xe820
        mov     edx, 0x534d4150         # "SMAP"
        mov     ecx, 20
        mov     di, ENTRY
        int     0x15
        jc      done
        cmp     dword ptr [ENTRY + 16], 1
        jne     skip
        mov     eax, [ENTRY + 8]
        add     [SUM], eax
        mov     eax, [ENTRY + 12]
        adc     [SUM + 4], eax
skip:   test    ebx, ebx
        jnz     next
done:   mov     si, offset text
        call    puts
        mov     eax, [SUM]              # up to the next MiB
        mov     edx, [SUM + 4]
        add     eax, 0xfffff
        adc     edx, 0
        shrd    eax, edx, 20
        mov     ebx, 10                 # decimal digits, last one first
        xor     cx, cx
1:      xor     edx, edx
        div     ebx
        push    dx
        inc     cx
        test    eax, eax
        jnz     1b
2:      pop     ax
        add     al, '0'
        call    putc
        loop    2b
        mov     al, 'M'
        call    putc
        call    newline
        cli
3:      hlt
        jmp     3b
        .include "serial.inc"
text:   .asciz  "memory "
