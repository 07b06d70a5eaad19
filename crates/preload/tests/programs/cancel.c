/* pthread_cancel of a thread in KVM_RUN: the ioctl is left, cleanup handlers run, and the vCPU is as good as
 * before. */
#include "vm.h"

static struct vm m;
static volatile int entered, cleaned_up;

static void clean_up(void *unused)
{
	cleaned_up++;
}

static void *run(void *unused)
{
	pthread_cleanup_push(clean_up, NULL);
	CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL) == 0);
	entered = 1;
	for (;;)
		ioctl(m.vcpu, KVM_RUN, 0);
	pthread_cleanup_pop(0);
	return NULL;
}

/* A thread that is cancelled outside KVM_RUN. */
static void *spin(void *unused)
{
	CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL) == 0);
	entered = 1;
	for (;;)
		;
	return NULL;
}

static void cancel(void *(*body)(void *), int delay)
{
	pthread_t thread;
	void *end;

	entered = 0;
	CHECK(pthread_create(&thread, NULL, body, NULL) == 0);
	while (!entered)
		sched_yield();
	usleep(delay);
	CHECK(pthread_cancel(thread) == 0);
	CHECK(pthread_join(thread, &end) == 0);
	CHECK(end == PTHREAD_CANCELED);
}

int main(void)
{
	/* 1: inc ax; jmp 1b */
	static const char loop[] = "\x40\xeb\xfd";
	struct kvm_regs before, after;

	m = new_vm(loop, sizeof(loop));
	cancel(spin, 0);
	for (int i = 0; i < 200; i++) {
		cancel(run, i % 8 * 200);
		CHECK(cleaned_up == i + 1);
		CHECK(ioctl(m.vcpu, KVM_GET_REGS, &before) == 0);
		m.run->immediate_exit = 1;
		CHECK(ioctl(m.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
		m.run->immediate_exit = 0;
		CHECK(ioctl(m.vcpu, KVM_GET_REGS, &after) == 0);
		CHECK(before.rip == after.rip && before.rax == after.rax);
	}
	return 0;
}
