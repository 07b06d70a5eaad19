/* /dev/kvm seems to be there, by every way to ask. */
#include "vm.h"
#include <sys/sysmacros.h>

static void is_kvm(const struct stat *st)
{
	CHECK(S_ISCHR(st->st_mode));
	CHECK(major(st->st_rdev) == 10 && minor(st->st_rdev) == 232);
}

int main(void)
{
	struct stat st;
	struct statx stx;
	int fd, dev;

	CHECK(stat("/dev/kvm", &st) == 0);
	is_kvm(&st);
	CHECK(lstat("/dev/kvm", &st) == 0);
	is_kvm(&st);
	CHECK(fstatat(AT_FDCWD, "/dev/kvm", &st, 0) == 0);
	is_kvm(&st);
	CHECK(statx(AT_FDCWD, "/dev/kvm", 0, STATX_ALL, &stx) == 0);
	CHECK(stx.stx_rdev_major == 10 && stx.stx_rdev_minor == 232);
	CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
	CHECK(euidaccess("/dev/kvm", R_OK | W_OK) == 0);
	CHECK(faccessat(AT_FDCWD, "/dev/kvm", R_OK | W_OK, 0) == 0);
	FAILS(access("/dev/kvm", X_OK), EACCES);
	FAILS(stat("/dev/kvm/", &st), access("/dev/kvm/", 0) ? errno : 0);

	CHECK((fd = open("/dev/kvm", O_RDWR | O_CLOEXEC)) >= 0);
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
	CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
	CHECK(fstat(fd, &st) == 0);
	is_kvm(&st);
	CHECK(statx(fd, "", AT_EMPTY_PATH, STATX_ALL, &stx) == 0);
	CHECK(stx.stx_rdev_major == 10 && stx.stx_rdev_minor == 232);
	CHECK(close(fd) == 0);
	FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), EBADF);

	CHECK((fd = open64("/dev/kvm", O_RDWR)) >= 0);
	CHECK(fcntl(fd, F_GETFD) == 0);
	CHECK(ioctl(fd, KVM_GET_VCPU_MMAP_SIZE, 0) == 12288);
	CHECK(close(fd) == 0);
	CHECK((dev = open("/dev", O_RDONLY | O_DIRECTORY)) >= 0);
	CHECK((fd = openat(dev, "kvm", O_RDWR)) >= 0);
	CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
	CHECK(close(fd) == 0 && close(dev) == 0);
	FAILS(open("/dev/kvm", O_RDWR | O_DIRECTORY), ENOTDIR);
	FAILS(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);

	/* Other files are what they were. */
	CHECK(stat("/dev/null", &st) == 0 && minor(st.st_rdev) == 3);
	FAILS(open("/dev/kvm-not", O_RDWR), ENOENT);
	return 0;
}
