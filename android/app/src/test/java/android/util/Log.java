package android.util;

/** ExecuTorch's Java classes log here; in a JVM there is no Android. */
public final class Log {
    public static int e(String tag, String text) {
        System.err.println(tag + ": " + text);
        return 0;
    }

    public static int e(String tag, String text, Throwable cause) {
        return e(tag, text);
    }
}
