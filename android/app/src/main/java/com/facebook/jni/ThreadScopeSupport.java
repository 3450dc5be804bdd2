package com.facebook.jni;

public class ThreadScopeSupport {
    private static void runStdFunction(long pointer) {
        runStdFunctionImpl(pointer);
    }

    private static native void runStdFunctionImpl(long pointer);
}
