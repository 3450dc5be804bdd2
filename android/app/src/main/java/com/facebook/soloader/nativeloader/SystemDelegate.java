package com.facebook.soloader.nativeloader;

public class SystemDelegate implements NativeLoaderDelegate {
    @Override
    public boolean loadLibrary(String shortName) {
        System.loadLibrary(shortName);
        return true;
    }
}
