package nb.calib.tagger

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.net.Uri
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import java.io.File
import java.io.FileInputStream
import java.io.IOException
import java.io.InputStream
import java.nio.channels.FileChannel
import java.security.MessageDigest

/** A program file with what it says of itself. */
class ProgramFile(val file: File, val program: Program, val spec: TaggerSpec) {
    val sha256: String by lazy {
        val digest = MessageDigest.getInstance("SHA-256")
        file.inputStream().use { stream ->
            val buffer = ByteArray(1 shl 16)
            while (true) {
                val read = stream.read(buffer)
                if (read < 0) break
                digest.update(buffer, 0, read)
            }
        }
        digest.digest().joinToString("") { "%02x".format(it) }
    }
}

/** Android's part of the benchmark: files, decoding, battery and heat, device, and the run itself. */
class ModelBenchmark(private val context: Context) {
    private val assets = context.assets
    private val folder: File get() = context.getExternalFilesDir(null) ?: context.filesDir

    /** Programs of the app, pushed ones (files/programs) and the chosen one, by name. */
    fun programs(): List<File> {
        val own = assets.list("programs").orEmpty().map { copied("programs/$it") }
        val pushed = File(folder, "programs").listFiles { f -> f.name.endsWith(".pte") }.orEmpty().sortedBy { it.name }
        return own + pushed + listOf(chosen).filter { it.exists() }
    }

    private val chosen get() = File(context.filesDir, "chosen.pte")

    /** An asset as a file: the library wants a path. */
    private fun copied(asset: String): File {
        val file = File(context.filesDir, asset)
        val info = context.packageManager.getPackageInfo(context.packageName, 0)
        if (file.exists() && file.lastModified() >= info.lastUpdateTime) return file
        file.parentFile?.mkdirs()
        assets.open(asset).use { from -> file.outputStream().use { from.copyTo(it) } }
        return file
    }

    /** Copies a chosen program into the app's own folder. */
    fun choose(uri: Uri): File {
        try {
            val stream = context.contentResolver.openInputStream(uri) ?: throw Refusal(Fault.NO_PROGRAM)
            stream.use { from -> chosen.outputStream().use { from.copyTo(it) } }
        } catch (e: IOException) {
            throw Refusal(Fault.NOT_A_PROGRAM, e.message.orEmpty(), e)
        }
        return chosen
    }

    /** Reads what a program says of itself; a file labels.txt beside the app's programs has the last word. */
    fun describe(file: File): ProgramFile {
        if (!file.canRead() || file.length() == 0L) throw Refusal(Fault.NOT_A_PROGRAM, file.name)
        val program = FileInputStream(file).channel.use {
            Program.read(it.map(FileChannel.MapMode.READ_ONLY, 0, file.length()))
        }
        val spec = program.spec()
        val labels = try {
            assets.open("labels.txt").bufferedReader().use { it.readLines() }.filter { it.isNotBlank() }
        } catch (e: IOException) {
            spec.classes
        }
        return ProgramFile(file, program, TaggerSpec(spec.model, labels, spec.size, spec.crop))
    }

    /** Pushed images (files/photos), else those of the app. */
    fun photos(): List<Photo> {
        val pushed = File(folder, "photos").listFiles { f -> f.isFile }.orEmpty().sortedBy { it.name }
        if (pushed.isNotEmpty()) return pushed.map { file -> StreamPhoto(file.name) { file.inputStream() } }
        return assets.list("photos").orEmpty().sorted().map { name -> StreamPhoto(name) { assets.open("photos/$name") } }
    }

    /** Chosen images. */
    fun photos(uris: List<Uri>): List<Photo> = uris.mapIndexed { k, uri ->
        StreamPhoto(uri.lastPathSegment?.substringAfterLast('/') ?: "image $k") {
            context.contentResolver.openInputStream(uri) ?: throw IOException("nothing behind $uri")
        }
    }

    private class StreamPhoto(override val name: String, private val open: () -> InputStream) : Photo {
        override fun load(): Pixels {
            val bytes = try {
                open().use { it.readBytes() }
            } catch (e: IOException) {
                throw Refusal(Fault.PHOTO_UNREADABLE, name, e)
            } catch (e: SecurityException) {
                throw Refusal(Fault.PHOTO_UNREADABLE, name, e)
            }
            val options = BitmapFactory.Options().apply {
                inPreferredConfig = Bitmap.Config.ARGB_8888
                inPremultiplied = false
                inScaled = false
            }
            val bitmap = BitmapFactory.decodeByteArray(bytes, 0, bytes.size, options)
                ?: throw Refusal(Fault.PHOTO_UNREADABLE, name)
            val pixels = IntArray(bitmap.width * bitmap.height)
            bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
            val stored = Pixels(bitmap.width, bitmap.height, pixels)
            bitmap.recycle()
            return Exif.upright(stored, Exif.orientation(bytes))
        }
    }

    /** What the phone tells about battery and heat. */
    val monitor = Monitor {
        val manager = context.getSystemService(Context.BATTERY_SERVICE) as BatteryManager
        val sticky = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))
        fun number(id: Int) = manager.getIntProperty(id).takeIf { it != Integer.MIN_VALUE && it != 0 }
        val power = context.getSystemService(Context.POWER_SERVICE) as PowerManager
        Health(
            batteryPercent = number(BatteryManager.BATTERY_PROPERTY_CAPACITY),
            currentUa = number(BatteryManager.BATTERY_PROPERTY_CURRENT_NOW),
            batteryCelsius = sticky?.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Integer.MIN_VALUE)
                ?.takeIf { it != Integer.MIN_VALUE }?.let { it / 10f },
            thermal = if (Build.VERSION.SDK_INT >= 29) power.currentThermalStatus else null,
        )
    }

    fun device(): DeviceInfo {
        val memory = ActivityManager.MemoryInfo()
        (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
        return DeviceInfo(
            Build.MANUFACTURER, Build.MODEL, Build.VERSION.RELEASE, soc(), Build.HARDWARE,
            Build.SUPPORTED_ABIS.firstOrNull().orEmpty(), Runtime.getRuntime().availableProcessors(),
            (memory.totalMem shr 20).toInt(),
        )
    }

    /** Build.SOC_MODEL, which came with Android 12 and is not in the API that this app is compiled against. */
    private fun soc(): String = try {
        Build::class.java.getField("SOC_MODEL").get(null) as? String ?: ""
    } catch (e: ReflectiveOperationException) {
        ""
    }

    /** Opens the program, measures, and gives the report with what only the app knows. */
    fun run(
        chosen: ProgramFile, photos: List<Photo>, plan: Plan, progress: (Int, PhotoResult) -> Unit,
        cancelled: () -> Boolean,
    ): Pair<Report, Map<String, Any?>> = ModuleNet.open(chosen.file.path, chosen.program).use { net ->
        val report = Engine(net, chosen.spec, monitor).benchmark(photos, plan, progress, cancelled)
        report to linkedMapOf(
            "program" to linkedMapOf(
                "file" to chosen.file.name, "sha256" to chosen.sha256, "bytes" to chosen.file.length(),
                "model" to chosen.spec.model, "size" to chosen.spec.size, "crop" to chosen.spec.crop,
            ),
            "backends" to net.backends,
            "registered" to ModuleNet.registered(),
            "device" to device().toMap(),
        )
    }

    /** Writes result.json in the app's folder. */
    fun save(report: Report, about: Map<String, Any?>): File = write(report.toMap(about))

    /** Writes a refusal in its place, so that a run by adb never leaves an older result. */
    fun save(refusal: Refusal): File =
        write(linkedMapOf("format" to 1, "fault" to refusal.fault.name, "detail" to refusal.detail))

    private fun write(content: Map<String, Any?>): File {
        val file = File(folder, "result.json")
        try {
            file.writeText(Json.write(content) + "\n")
        } catch (e: IOException) {
            throw Refusal(Fault.NOT_SAVED, e.message.orEmpty(), e)
        }
        return file
    }
}
