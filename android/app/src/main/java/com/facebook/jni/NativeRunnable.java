package com.facebook.jni;

public class NativeRunnable implements Runnable {
    private final HybridData mHybridData;

    private NativeRunnable(HybridData data) {
        mHybridData = data;
    }

    @Override
    public native void run();
}
