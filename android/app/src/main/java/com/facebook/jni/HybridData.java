package com.facebook.jni;

import com.facebook.soloader.nativeloader.NativeLoader;

/** What libfbjni looks up by name: a Java object that holds a pointer to a C++ one. Written for this app. */
public class HybridData {
    static {
        NativeLoader.loadLibrary("fbjni");
    }

    private final Destructor mDestructor = new Destructor();

    public synchronized void resetNative() {
        mDestructor.destruct();
    }

    public boolean isValid() {
        return mDestructor.mNativePointer != 0;
    }

    public static class Destructor {
        private volatile long mNativePointer;

        final void destruct() {
            long pointer = mNativePointer;
            mNativePointer = 0;
            if (pointer != 0) {
                deleteNative(pointer);
            }
        }

        static native void deleteNative(long pointer);
    }
}
