#include "support/direct_file.hpp"

#include <cerrno>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#define PACELINE_FILES
#endif

namespace paceline {

#if defined(PACELINE_FILES)

namespace {

[[noreturn]] void fail(const std::string& what, const std::string& path, int error) {
    const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    throw FileError(what + " " + path + ": " + std::strerror(error) +
                    (full ? "; free some space, or set XDG_CACHE_HOME to a folder on another disk"
                          : ""));
}

#if defined(O_DIRECT)
constexpr int kDirect = O_DIRECT;
#else
constexpr int kDirect = 0;
#endif

}  // namespace

DirectFile::DirectFile(const std::string& path) : path_(path) {
    const int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC;
    if (kDirect) descriptor_ = ::open(path.c_str(), flags | kDirect, 0600);
    direct_ = descriptor_ >= 0;
    if (!direct_ && (!kDirect || errno == EINVAL)) {
        ::unlink(path.c_str());  // some file systems create it before they refuse
        descriptor_ = ::open(path.c_str(), flags, 0600);
    }
    if (descriptor_ < 0) fail("cannot create", path, errno);
#if defined(F_NOCACHE)
    direct_ = ::fcntl(descriptor_, F_NOCACHE, 1) == 0;
#endif
    ::unlink(path.c_str());
}

DirectFile::~DirectFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void DirectFile::write(size_t offset, const uint8_t* from, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t count = ::pwrite(descriptor_, from + done, bytes - done,
                                       static_cast<off_t>(offset + done));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) fail("cannot write", path_, count ? errno : ENOSPC);
        done += static_cast<size_t>(count);
    }
#if defined(POSIX_FADV_DONTNEED)
    if (direct_) return;
    if (::fdatasync(descriptor_)) fail("cannot write", path_, errno);
    ::posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                    POSIX_FADV_DONTNEED);
#endif
}

void DirectFile::read(size_t offset, uint8_t* to, size_t bytes) const {
    for (size_t done = 0; done < bytes;) {
        const ssize_t count = ::pread(descriptor_, to + done, bytes - done,
                                      static_cast<off_t>(offset + done));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) fail("cannot read", path_, errno);
        if (count == 0 || (direct_ && static_cast<size_t>(count) % kAlign))
            throw FileError("cannot read " + path_ + ": it is shorter than what was written, " +
                            std::to_string(offset + done + static_cast<size_t>(count)) +
                            " bytes; open the model again");
        done += static_cast<size_t>(count);
    }
#if defined(POSIX_FADV_DONTNEED)
    if (!direct_)
        ::posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                        POSIX_FADV_DONTNEED);
#endif
}

#else

DirectFile::DirectFile(const std::string& path) : path_(path) {
    throw FileError("cannot create " + path + ": weights do not stream on this system");
}
DirectFile::~DirectFile() = default;
void DirectFile::write(size_t, const uint8_t*, size_t) {}
void DirectFile::read(size_t, uint8_t*, size_t) const {}

#endif

}  // namespace paceline
