# A debugger's session with a running Linux kernel, through QEMU's gdbstub. Run by gdb; ANYKVM_GDB names the
# stub's socket and a file of symbols ("NAME=ADDRESS"). Ends with "gdb: all done", or says what was wrong.

import os
import gdb

socket, symbols = os.environ["ANYKVM_GDB"].split(",")
address = {}
with open(symbols) as lines:
    for line in lines:
        name, value = line.split("=")
        address[name] = int(value, 16)


def do(command):
    return gdb.execute(command, to_string=True)


def number(expression):
    return int(gdb.parse_and_eval(expression)) & (1 << 64) - 1


def pc():
    return number("(unsigned long)$pc")


def word(at):
    return number("*(unsigned long *)%#x" % at)


def code(at, count):
    return bytes(gdb.selected_inferior().read_memory(at, count))


def check(what, truth):
    if not truth:
        print("gdb: wrong: %s, at %#x in thread %d" % (what, pc(), gdb.selected_thread().num))
        print(do("info registers rax rbx rcx rdx rsi rdi rsp rip eflags dr6 dr7 cr2"))
        do("kill")
        gdb.execute("quit 1")


def passed(what):
    print("gdb: %s" % what, flush=True)


def go():
    return do("continue")


def clear():
    do("delete")


for setting in ["pagination off", "confirm off", "architecture i386:x86-64", "remotetimeout 100", "width 0"]:
    do("set " + setting)
do("target remote " + socket)
check("two threads", len(gdb.selected_inferior().threads()) == 2)
passed("attached")

# Software breakpoints, on both processors.
do("break *%#x" % address["do_sys_openat2"])
seen = set()
for turn in range(60):
    go()
    check("a software breakpoint", pc() == address["do_sys_openat2"])
    seen.add(gdb.selected_thread().num)
    if turn > 5 and len(seen) == 2:
        break
check("both processors at a breakpoint", len(seen) == 2)
clear()
passed("software breakpoints")

# Hardware breakpoints.
do("hbreak *%#x" % address["vfs_read"])
for turn in range(5):
    go()
    check("a hardware breakpoint", pc() == address["vfs_read"])
clear()
passed("hardware breakpoints")

# A watchpoint for writes: jiffies are written by the timer's interrupt.
jiffies = address["jiffies_64"]
do("watch *(unsigned long *)%#x" % jiffies)
last = word(jiffies)
for turn in range(5):
    go()
    now = word(jiffies)
    check("a write was watched", now > last)
    last = now
clear()
passed("watch")

# For reads and writes; then for reads (which QEMU takes for both, and gdb sorts out).
for kind in ["awatch", "rwatch"]:
    do("%s *(unsigned long *)%#x" % (kind, jiffies))
    point = gdb.breakpoints()[-1]
    for turn in range(5):
        go()
        check("an access was watched", point.hit_count == turn + 1)
    clear()
    passed(kind)

# Many single-steps: QEMU asks for no interrupts meanwhile, so that none is seen.
do("break *%#x" % address["do_sys_openat2"])
go()
clear()
interrupt = address["asm_sysvec_apic_timer_interrupt"]
thread = gdb.selected_thread().num
places = set()
for step in range(300):
    do("stepi")
    check("the same processor", gdb.selected_thread().num == thread)
    check("no interrupt in a single-step", not interrupt <= pc() < interrupt + 16)
    places.add(pc())
check("the steps went somewhere", len(places) > 50)
passed("single-steps")

# IRET: to where the frame says.
iret = address["native_irq_return_iret"]
do("hbreak *%#x" % iret)
for turn in range(3):
    go()
    check("at IRET", pc() == iret)
    stack = number("(unsigned long)$rsp")
    where, flags = word(stack), word(stack + 16)
    clear()
    do("stepi")
    check("behind IRET", pc() == where)
    check("TF is not seen", number("$eflags") & 0x100 == flags & 0x100)
    do("hbreak *%#x" % iret)
clear()
passed("iret")

# STI in the kernel's way into a system call.
sti = None
for name in ["syscall_enter_from_user_mode", "do_syscall_64"]:
    for line in do("x/60i %#x" % address[name]).splitlines():
        if sti is None and line.rstrip().endswith("\tsti"):
            sti = int(line.replace("=>", "").split(":")[0].split()[0], 16)
check("an STI is known", sti is not None)
do("hbreak *%#x" % sti)
go()
check("at STI", pc() == sti)
clear()
do("stepi")
check("behind STI", pc() == sti + 1)
check("IF", number("$eflags") & 0x200 != 0)
passed("sti")

# MOV SS in a program.
mov_ss = address["mov_ss"]
do("hbreak *%#x" % mov_ss)
for turn in range(3):
    go()
    check("at MOV SS", pc() == mov_ss and code(mov_ss, 2) == b"\x8e\xd0")
    clear()
    do("stepi")
    # Processors trap behind the instruction that follows.
    check("behind MOV SS", pc() in (mov_ss + 2, mov_ss + 3))
    do("stepi")
    check("two behind MOV SS", pc() in (mov_ss + 3, mov_ss + 4))
    do("hbreak *%#x" % mov_ss)
clear()
passed("mov ss")

# The guest may end.
do("set *(int *)%#x = 77" % address["panic_timeout"])
do("detach")
passed("all done")
