package com.facebook.soloader.nativeloader;

/** The loader that ExecuTorch's Java classes call; the whole of SoLoader is not needed. Written for this app. */
public class NativeLoader {
    private static NativeLoaderDelegate sDelegate;

    public static synchronized void init(NativeLoaderDelegate delegate) {
        sDelegate = delegate;
    }

    public static synchronized boolean isInitialized() {
        return sDelegate != null;
    }

    public static synchronized boolean loadLibrary(String shortName) {
        if (sDelegate == null) {
            sDelegate = new SystemDelegate();
        }
        return sDelegate.loadLibrary(shortName);
    }
}
